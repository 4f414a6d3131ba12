"""The only writer of live state. `SchedulerState` decides, synchronously and without I/O; `Scheduler` performs."""
