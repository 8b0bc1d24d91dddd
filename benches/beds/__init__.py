"""Test beds on which it can be seen whether ranks that grow or move pay: beds where rank is short.

    python -m benches.beds planted --r 2 --lr 2.5e-3,5e-3,1e-2
    python -m benches.beds planted --planted-ranks 4,8,24 --blocks 6 --decay 0.9 --r 0.25,0.5,1,2,4
    python -m benches.beds planted --arms lora,increlora:growth_end=0.6,importance=sensitivity,ceiling
    python -m benches.beds planted --report
    python -m benches.beds memory --source-r 16 --jobs 2
    python -m benches.beds text --r 1,2 --base small

Three beds, all from packages of PyPI: ``planted`` (MiniLM with updates of low rank in a few modules is to
be found again), ``memory`` (a small decoder learns random strings by heart), ``text`` (a decoder learns a
kind of text unlike what it was trained on).

All arms of a seed get the same model, batches and evaluation, and LoRA's A drawn by module and seed. Each
tries all learning rates on tuning seeds; the best goes on to the paired seeds. A line of JSON a run goes to
``--out``; what is there is not run again. Arms (``arms.py``): uniform LoRA; LoRA on query and value, or on
the MLP alone, at as many parameters; ``increlora`` (the default form), ``sensitivity``, ``lot`` (modules that
grow by lot); the ceiling (ranks known, or cut from a large LoRA that was trained first); final ranks of a run
of ours, shuffled within families of modules or over all.
"""
