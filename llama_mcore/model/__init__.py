"""The model: LLaMA's layers in megatron-core's GPTModel, with a manual backward.

`parameters.py` lists what is trained. The maths (rmsnorm, rope, qkv, swiglu, layer_function) knows no device
and no process group; shapes stand at line ends. `attention/` has a file for each backend, `kernels.py`
chooses among fused functions, `build.py` puts the whole together. May import `distributed` and the section
base of `config`. Begin with parameters.py, then layer.py, layer_function.py and build.py.
"""
