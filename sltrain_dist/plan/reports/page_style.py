"""The style of the planner's page: light and dark, and on a narrow screen tables become lists."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #f7f8fa; --card: #ffffff; --text: #1b1f24; --quiet: #59626d; --line: #d9dee4; --good: #1d7a45; --bad: #b3261e;
  --warn: #8a5a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1d2127; --text: #e8ebee; --quiet: #a3acb7; --line: #363d46; --good: #5cc98a;
    --bad: #ff8a80; --warn: #e8b04a;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 60rem; padding: 1.25rem 1rem 3rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; overflow-wrap: break-word;
}
h1 { font-size: 1.25rem; line-height: 1.3; margin: 0 0 .25rem; }
h2 { font-size: 1.05rem; margin: 0 0 .75rem; }
p { margin: .25rem 0; }
.quiet { color: var(--quiet); font-size: .9rem; }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem; margin-top: 1rem;
}
.big { font-size: 2.2rem; font-weight: 700; line-height: 1.15; font-variant-numeric: tabular-nums; }
.good { color: var(--good); font-weight: 600; } .bad { color: var(--bad); font-weight: 600; }
.warn { color: var(--warn); font-weight: 600; }
.meter {
  display: flex; height: 1.4rem; margin: .9rem 0 .7rem; border-radius: .3rem; overflow: hidden;
  background: var(--line); gap: 1px;
}
.meter { position: relative; }
.meter i { display: block; height: 100%; }
.meter b { position: absolute; top: 0; bottom: 0; width: 3px; background: var(--bad); outline: 1px solid var(--card); }
.slack { background: repeating-linear-gradient(45deg, var(--quiet) 0 3px, transparent 3px 6px); }
dl.parts {
  margin: 0; display: grid; grid-template-columns: auto 1fr auto auto; gap: .35rem .7rem; align-items: center;
}
dl.parts dt, dl.parts dd { margin: 0; }
dl.parts .bar { height: .6rem; border-radius: .2rem; min-width: 2px; }
dl.parts dd.number, td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
dl.parts .detail { color: var(--quiet); font-size: .85rem; padding-left: 1.4rem; }
.ceiling { display: inline-block; width: 1.2rem; border-top: 2px dashed var(--bad); margin: 0 .5rem .25rem 0; }
.swatch { display: inline-block; width: .75rem; height: .75rem; border-radius: .15rem; margin-right: .5rem; }
.plot { position: relative; height: 16rem; margin: 1.6rem 0 .2rem 3.4rem; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.plot polygon { stroke: var(--card); stroke-width: 1; vector-effect: non-scaling-stroke; }
.plot line { stroke: var(--line); stroke-width: 1; vector-effect: non-scaling-stroke; }
.plot line.border { stroke: var(--quiet); stroke-dasharray: 2 4; }
.plot line.peak { stroke: var(--text); stroke-width: 1.5; }
.plot line.device { stroke: var(--bad); stroke-width: 1.5; stroke-dasharray: 6 4; }
.plot span { position: absolute; font-size: .75rem; line-height: 1; white-space: nowrap; }
.plot .tick { right: calc(100% + .4rem); transform: translateY(-50%); color: var(--quiet); }
.plot .above { bottom: calc(100% + .35rem); font-weight: 600; }
.phases { display: flex; margin: .6rem 0 0 3.4rem; font-size: .75rem; color: var(--quiet); }
.phases span { display: flex; justify-content: center; white-space: nowrap; overflow-wrap: normal; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .8rem 0 0; padding: 0; list-style: none; }
.legend li { font-size: .85rem; }
table { width: 100%; border-collapse: collapse; font-size: .9rem; }
th, td { padding: .3rem .5rem; border-bottom: 1px solid var(--line); text-align: left; font-weight: 400; }
thead th { color: var(--quiet); font-size: .8rem; vertical-align: bottom; }
thead th.number { text-align: right; }
tr.total th, tr.total td { font-weight: 600; }
tr.detail th { padding-left: 1.75rem; color: var(--quiet); }
tr.detail td { color: var(--quiet); }
.peak-phase { font-weight: 700; }
ul.changes { margin: .5rem 0 0; padding-left: 1.2rem; }
code { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: .85em; overflow-wrap: anywhere; }
summary { cursor: pointer; }
@media (max-width: 44rem) {
  .big { font-size: 1.8rem; }
  dl.parts { grid-template-columns: 1fr auto auto; }
  .phases span:nth-child(3n + 2) { padding-top: 1.2rem; }
  .phases span:nth-child(3n) { padding-top: 2.4rem; }
  dl.parts dd.track { display: none; }
  table.stack thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  table.stack tr {
    display: flex; flex-wrap: wrap; gap: .1rem .9rem; padding: .45rem 0; border-bottom: 1px solid var(--line);
  }
  table.stack th { flex: 1 0 100%; border: 0; padding: 0; }
  table.stack tr.detail th { padding-left: 1.25rem; }
  table.stack td { border: 0; padding: 0; white-space: normal; text-align: left; }
  table.stack td::before { content: attr(data-title) " "; color: var(--quiet); font-size: .8rem; font-weight: 400; }
  table.stack tr.detail td:first-of-type { margin-left: 1.25rem; }
  table.stack td:empty { display: none; }
}
@media print { body { max-width: none; } section { break-inside: avoid; } }
"""
