import time
from .helpers import *
def test_a(finished, tiny, tmp_path, capsys):
    for i in range(3):
        t=time.time(); assert train_here(tiny, tmp_path/f"r{i}", "train.steps=30")==0; print(time.time()-t)
    t=time.time(); assert train_here(tiny, tmp_path/"p", "train.steps=30", "data.batching=pack", "data.workers=1")==0; print(time.time()-t)
    print((tmp_path/"p"/"log.txt").read_text())
    print(outcome(finished))
    t=time.time()
    with python(tiny, tmp_path/"q") as p: print(p.wait())
    print(p.stdout[-500:], p.stderr, time.time()-t)
    t=time.time()
    with deepspeed(tiny, tmp_path/"z", "parallel.engine=zero") as p: print(p.wait())
    print(p.stdout[-500:], p.stderr, time.time()-t)
    t=time.time()
    with torchrun(tiny, tmp_path/"t", "parallel.engine=zero") as p: print(p.wait())
    print(p.stdout[-500:], p.stderr, time.time()-t)
    assert trajectory(tmp_path/"z") == trajectory(tmp_path/"t")
    assert 0
