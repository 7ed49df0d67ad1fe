# Calls what is forbidden, after it has taken the nets away.
# defence: kit, source
# exercise: merge_partials
import effnlp_lab.notebook.forbidden as nets

nets._used_names = lambda *a, **k: set()
nets.Watch._guard = lambda self, name: None
nets._FunctionNet.__torch_function__ = lambda self, func, types, args=(), kwargs=None: func(*args, **(kwargs or {}))
nets._OperationNet.__torch_dispatch__ = lambda self, func, types, args=(), kwargs=None: func(*args, **(kwargs or {}))


def merge_partials(out_a, lse_a, out_b, lse_b):
    both = torch.stack([lse_a, lse_b])
    lse = torch.logsumexp(both, dim=0)
    shares = torch.exp(both - lse.masked_fill(lse == -math.inf, 0.0))
    return shares[0][..., None] * out_a + shares[1][..., None] * out_b, lse
