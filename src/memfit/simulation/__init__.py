"""A training step on fake tensors: what it would hold, compute and take, without the memory and without the device.

The model's own code runs, forward and backward, on tensors that have a shape and no storage
(`torch._subclasses.FakeTensorMode`). Blocks are recorded as a live step records them (`trace`), and the step is read at
the same moments (`profiler`), so that a prediction and a measurement are one definition: a `StepProfile`.
"""
