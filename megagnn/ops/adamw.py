"""AdamW over flat buffers, in one pass over memory, and the gradient norm that goes with it."""

import torch
from torch import Tensor

from megagnn.ops import extension, reference

_OPS = torch.ops.megagnn
_STATE_DTYPE = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
}


def adamw_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    master: Tensor | None = None,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float = 1.0,
) -> None:
    """Updates `param`, the moments and `master` in place (Loshchilov and Hutter, ICLR 2019, Algorithm 2).

        g = grad_scale grad;  m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
        w = (1 - lr weight_decay) w - lr m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps)

    All tensors are contiguous and have one number of elements. param is float32 or float64, and exp_avg (m)
    and exp_avg_sq (v) have its type; or it is bfloat16, m and v are float32, and so is `master`, from which
    it is rounded to nearest even after every step. grad has the type of m, or is bfloat16 beside float32.
    `step` counts from 1. `grad_scale` clips without a pass of its own. No element depends on another, so the
    bits do not depend on the number of threads. NaN and infinity pass through.

    Raises ValueError where sizes, types, devices or strides do not fit.
    """
    scalars = (lr, *betas, eps, weight_decay, step, grad_scale)
    on_cpu = extension.has_cpu and param.is_cpu and grad.is_cpu and exp_avg.is_cpu and exp_avg_sq.is_cpu
    on_cuda = extension.has_cuda and param.is_cuda and grad.is_cuda and exp_avg.is_cuda and exp_avg_sq.is_cuda
    if (on_cpu or on_cuda) and (master is None or master.device == param.device):
        try:
            with torch._C._AutoDispatchBelowAutograd():  # as no_grad, at a fraction of its cost
                _OPS.adamw_.default(param, grad, exp_avg, exp_avg_sq, master, *scalars)
        except RuntimeError:  # it checks for itself, before it writes; what follows is for the words
            _check(param, grad, exp_avg, exp_avg_sq, master, step)
            raise
        torch.autograd.graph.increment_version(param)
        return
    _check(param, grad, exp_avg, exp_avg_sq, master, step)
    if extension.module is not None:
        extension.warn_reference(param.device.type)
    reference.adamw_(param, grad, exp_avg, exp_avg_sq, master, *scalars)


@torch.no_grad()
def square_sum(values: Tensor) -> Tensor:
    """Sum of the squares of a contiguous tensor, as a float64 scalar on its device.

    float32 and bfloat16 are squared and added as float32 over runs of 1024 values, the runs as float64: the
    error does not grow with the size, and on a CPU no bit depends on the number of threads. Raises ValueError
    for a type other than float32, float64 and bfloat16, or a tensor that is not contiguous.
    """
    where = f"square_sum ({extension.backend()})"
    if values.dtype not in _STATE_DTYPE:
        raise ValueError(f"{where}: values must be float32, float64 or bfloat16, got {values.dtype}")
    if not values.is_contiguous():
        raise ValueError(f"{where}: values must be contiguous, got strides {values.stride()}")
    if extension.has_cpu and values.is_cpu:
        return torch.tensor(_OPS.square_sum.default(values), dtype=torch.float64)
    return reference.square_sum(values)


def _check(
    param: Tensor, grad: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, master: Tensor | None, step: int
) -> None:
    where = f"adamw_ ({extension.backend()})"
    if param.dtype not in _STATE_DTYPE:
        raise ValueError(f"{where}: param must be float32, float64 or bfloat16, got {param.dtype}")
    if (param.dtype == torch.bfloat16) != (master is not None):
        raise ValueError(
            f"{where}: bfloat16 parameters and no others must have a float32 master copy, "
            f"got {param.dtype} {'without' if master is None else 'with'} one"
        )
    if step < 1:
        raise ValueError(f"{where}: step must count from 1, got {step}")
    state = _STATE_DTYPE[param.dtype]
    grad_dtypes = (state, torch.bfloat16) if state == torch.float32 else (state,)
    _check_buffer(where, "param", param, param, (param.dtype,))
    _check_buffer(where, "grad", grad, param, grad_dtypes)
    _check_buffer(where, "exp_avg", exp_avg, param, (state,))
    _check_buffer(where, "exp_avg_sq", exp_avg_sq, param, (state,))
    if master is not None:
        _check_buffer(where, "master", master, param, (state,))


def _check_buffer(
    where: str, name: str, tensor: Tensor, param: Tensor, dtypes: tuple[torch.dtype, ...]
) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(
            f"{where}: {name} must be {' or '.join(str(d) for d in dtypes)} where param is {param.dtype}, "
            f"got {tensor.dtype}"
        )
    if tensor.numel() != param.numel():
        raise ValueError(
            f"{where}: {name} must have as many elements as param, {param.numel()}, got {tensor.numel()}"
        )
    if not tensor.is_contiguous():
        raise ValueError(
            f"{where}: {name} must be contiguous, got strides {tensor.stride()} for shape "
            f"{tuple(tensor.shape)}; pass the flat buffer itself"
        )
    if tensor.device != param.device:
        raise ValueError(
            f"{where}: {name} must be on the device of param, {param.device}, got {tensor.device}"
        )


if extension.module is not None:

    @torch.library.register_fake("megagnn::adamw_")
    def _(param: Tensor, *_: object) -> None:
        return None
