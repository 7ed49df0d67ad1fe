"""Distillation: a small model learns from a large one's distributions, and a large model is cut into a small one.

| file | what it holds |
|---|---|
| losses.py | divergences with temperature, cross-entropy, cosine of hidden states: the definitions |
| settings.py | which loss, at what temperature and weights; what is refused |
| rows.py | loss and gradient of rows of logits in PyTorch |
| kernel_rows.py | the same as one fused Triton kernel, gradient in place |
| fused_linear.py | hidden states and weights to loss and gradients, chunk by chunk: the logits are never whole |
| student.py | a student from every other layer of its teacher |
| trainer.py | the distillation loss of a batch, and training's trainer with it |
| on_policy.py | generalized knowledge distillation: the student learns on what it samples itself |
| hard_concrete.py | random masks that are exactly 0 or 1 most of the time, and have gradients |
| prunable.py | a model under masks of layers, heads, MLP and hidden dimensions, held to a target shape |
| cutting.py | the masked model as a smaller one that plain `transformers` opens |

Names are loaded on first use: the PyTorch parts work where Triton is not installed.
"""

from effnlp_lab.lazy import lazily as _lazily

_HOMES = {
    "DistillationLoss": "trainer",
    "DistillationTrainer": "trainer",
    "HardConcrete": "hard_concrete",
    "LossSettings": "settings",
    "OnPolicyDistillation": "on_policy",
    "PrunableModel": "prunable",
    "TargetShape": "prunable",
    "alternate_layers": "student",
    "chunked_linear_loss": "fused_linear",
    "cross_entropy": "losses",
    "cut": "cutting",
    "forward_kl": "losses",
    "fused_linear_cross_entropy": "fused_linear",
    "fused_linear_jsd": "fused_linear",
    "fused_linear_kl": "fused_linear",
    "hidden_cosine": "losses",
    "jensen_shannon": "losses",
    "pruning_loss": "prunable",
    "pruning_parameters": "prunable",
    "reverse_kl": "losses",
    "sample_continuations": "on_policy",
    "soft_targets": "losses",
    "student_from_layers": "student",
    "training_flops": "trainer",
}
__all__ = sorted(_HOMES)
__getattr__ = _lazily(__name__, _HOMES)
