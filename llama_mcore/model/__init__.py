"""The model: LLaMA's layers on megatron-core's spec, with a backward written by hand.

`parameters.py` lists what is trained. The maths (rmsnorm, rope, swiglu, layer_function) knows no device and
no process group; shapes stand at line ends. `attention/` has a file for each backend, `kernels.py` chooses
among fused functions, `build.py` puts the whole together. May import `distributed` and the section base of
`config`. Begin with layer.py, then layer_function.py, then spec.py and build.py.
"""
