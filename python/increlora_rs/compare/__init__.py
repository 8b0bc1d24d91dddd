"""Methods side by side on the same tasks, at the same budget of ranks: ``increlora-rs compare``.

The protocol: every method gets the same learning rates to try, on the same trial seeds. The learning
rate with the best official metric on the development set after the last epoch is a method's own, and
all seeds are trained at it. Nothing else is tuned: model, data, order of the batches, the classifier's
first weights, alpha, dropout, schedule and number of steps are the same for all. Where a task has a test
set, it is measured once after each training and never chosen by.

The rank is the same for all, the parameters need not be: LoRA-Mini, whose point is to train fewer, keeps its
own sizes (``lora_mini:lora_a=64,lora_b=64`` sets others); SoRA begins with the rank and closes gates; AdaLoRA
begins with half as much again, PEFT's as ``adalora`` and ours as ``adalora_rs``; MELoRA trains as many in an
update of a higher rank, MoRA the square nearest to them. Tables have the parameters that each method trains,
and those that are left.

A run is one line of JSON, written when the run is over; a killed comparison goes on after the last one.
"""
