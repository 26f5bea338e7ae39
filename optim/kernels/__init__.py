"""Triton kernels of the orthogonalisation and of Muon's step around it.

Each file: what it computes, the same in float64 as a reference, the kernel, the launcher. Whoever imports one imports
Triton: optim/backend.py does, where a run has chosen it. Launch configurations are fixed (configurations.py): nothing
is tuned while a model trains.
"""
