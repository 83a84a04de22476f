"""Merges of several models over a base: linear, DARE and TIES, as mergekit, peft or the paper do.

A model is a module, a state dict or a path: a safetensors file, or a folder of them with or without
an index. The result is a new state dict (``module.load_state_dict(result)``) or, with ``out=``, a
file or folder like that of the base, which is there when it is whole. Tensors are merged one after
the other through memory maps: of files no more is in memory than is being worked on.

=============  =======================  ======================  ============================
               ``semantics="mergekit"`` ``"peft"``              ``"ties"`` (arXiv 2306.01708)
=============  =======================  ======================  ============================
largest        of each tensor, at       of each tensor          of all tensors together, all
               least one                                        that are not below the last
at random      brought back to the L1   times 1 / density       (not there)
               norm of the delta
elected sign   of the sum of weighted   of the sum of deltas,   of the sum of deltas; where
               deltas                   or of their signs       it is 0, that of most
                                                                elements
combined       divided by the weights   mean of those that      mean, sum or maximum of
               of those that agree      agree                   those that agree
arithmetic     deltas are rounded to    float32                 deltas are rounded to the
               the models' dtype                                models' dtype
=============  =======================  ======================  ============================

Sums are float32 and the result is rounded once, to the dtype of the base. Random masks are words of
the noise contract (:mod:`zokern.noise`) of the seed, the model's position and the tensor's name, so
a merge has the same bits on every backend, device and grouping.
"""

from zokern.merge.methods import dare, dare_ties, linear, ties

__all__ = ["dare", "dare_ties", "linear", "ties"]
