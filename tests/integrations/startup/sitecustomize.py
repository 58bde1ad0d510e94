"""Python imports this first in every process of a run: ranks that end well do so together, with nothing under way.

Entry points that do not leave their process group (the Trainer's, for one) may end with a collective under way, as
ZeRO-3 prefetches. If it ends while the interpreter shuts down, Gloo's thread frees its tensors there, and that aborts
the process, with Memfit and without, now and then: more often on busy cores. See
https://github.com/pytorch/pytorch/pull/179291.
"""

import atexit
import sys
import time


@atexit.register
def _leave() -> None:
    distributed = sys.modules.get("torch.distributed")
    failed = hasattr(sys, "last_type")  # the others may not come to where this rank would wait for them
    if distributed is not None and not failed and distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        time.sleep(0.2)  # what was begun before the barrier is as good as done; its thread needs the interpreter's lock
        distributed.destroy_process_group()
