"""The `sltrain plan` command: will a run fit, and which settings would make it fit?"""
