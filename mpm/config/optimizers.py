"""The optimizers of fine-tuning, each with its own keys."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from mpm.config.section import Positive
from mpm.config.training import Beta, Moments, Optim

__all__ = ["AdamWOptim", "AnyFinetuneOptim", "FinetuneOptim", "LambOptim", "LarsOptim", "SGDOptim"]


class FinetuneOptim(Optim):
    """What all optimizers of fine-tuning have."""

    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Rate of a layer over that of the next (BEiT, MAE: 0.65 to 0.8)."""


class AdamWOptim(Moments, FinetuneOptim):
    """AdamW (DeiT, CaiT, BEiT, MAE)."""

    is_default_kind: ClassVar = True

    kind: Literal["adamw"] = "adamw"


class LambOptim(Moments, FinetuneOptim):
    """LAMB (arXiv:1904.00962; RSB, DeiT III): the step of what decays is scaled to the weights' norm."""

    kind: Literal["lamb"] = "lamb"
    eps: Positive = 1e-6
    """Added to the denominator (RSB; DeiT III: 1e-8)."""


class LarsOptim(FinetuneOptim):
    """LARS (arXiv:1708.03888; MAE's linear probe): SGD, the gradient of matrices scaled to their norm."""

    kind: Literal["lars"] = "lars"
    momentum: Beta = 0.9
    """Share of the last step in the next."""


class SGDOptim(FinetuneOptim):
    """SGD with momentum (DeiT's transfer to small sets)."""

    kind: Literal["sgd"] = "sgd"
    momentum: Beta = 0.9
    """Share of the last step in the next."""
    nesterov: bool = False
    """Look ahead by the momentum (timm's sgd does)."""

    @model_validator(mode="after")
    def _check_nesterov(self) -> "SGDOptim":
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov looks ahead by the momentum, which is 0; set nesterov to false")
        return self


def _adamw_by_default(value: Any) -> Any:
    return {"kind": "adamw", **value} if isinstance(value, dict) else value


AnyFinetuneOptim = Annotated[
    Annotated[AdamWOptim | LambOptim | LarsOptim | SGDOptim, Field(discriminator="kind")],
    BeforeValidator(_adamw_by_default),
]
