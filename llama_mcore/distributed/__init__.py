"""Distributed execution: devices, process groups, collectives, rendezvous.

`device.py` is the only file of the package that names a device. `launch_env.py` reads from the launcher's
variables which rank this is, `rendezvous.py` brings ranks together, `groups.py` makes the groups,
`tp_comm.py` runs tensor-parallel communication beside computation. `mpu.py` is the border to DeepSpeed,
`mcore_cpu.py` lets megatron-core run on a CPU. May import nothing but the root's files and the section base
of `config`. Begin with groups.py.
"""
