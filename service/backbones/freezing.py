"""What a config freezes of a network: names of parameters without gradient and of norms kept in eval mode."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from service.backbones.norms import BATCH_NORMS, NORMS
from service.config.spec import Freeze, FreezeReport

# torchvision's batch norm with constant statistics, weight and bias, as libraries' configs name it.
FROZEN_BATCH_NORM = "FrozenBatchNorm2d"


def freeze_report(
    network: nn.Module,
    freeze: Freeze,
    frozen: Sequence[str],
    *,
    norms_follow: bool = True,
    configured: Sequence[str] | None = None,
) -> FreezeReport:
    """The report for a network whose modules and parameters named in `frozen` are frozen.

    On top of those come the rules that all OpenMMLab families share: `norm_eval` puts every batch norm into
    eval mode, `all_norms` (`norm_cfg=dict(requires_grad=False)`) takes the gradient from every norm.

    Args:
        network: whose names are reported, in module order.
        freeze: what the config asks for.
        frozen: names of modules or parameters, by the family's rule for `freeze.stages`.
        norms_follow: whether the norms of frozen modules go into eval mode (not so in VisionTransformer).
        configured: names of the modules whose norms follow `norm_cfg`, and so `all_norms`; None is the network.
    """
    without_gradient = (*frozen, *freeze.constant)
    parameters = {name for name, _ in network.named_parameters() if is_under(name, without_gradient)}
    norms = {name for name in norm_names(network) if norms_follow and is_under(name, frozen)}
    if freeze.norm_eval:
        norms |= set(norm_names(network, BATCH_NORMS))
    if freeze.all_norms:
        every_norm = [
            name for name in norm_names(network) if configured is None or is_under(name, configured)
        ]
        parameters |= {name for name, _ in network.named_parameters() if is_under(name, every_norm)}
    return in_module_order(network, freeze, parameters, norms)


def in_module_order(
    network: nn.Module, freeze: Freeze, parameters: Iterable[str], norms: Iterable[str]
) -> FreezeReport:
    """The report for these names, sorted as the network lists them."""
    frozen, in_eval = set(parameters), set(norms)
    names = [name for name, _ in network.named_parameters()]
    return FreezeReport(
        stages=freeze.stages,
        parameters=tuple(name for name in names if name in frozen),
        norms=tuple(name for name, _ in network.named_modules() if name in in_eval),
        of=len(names),
    )


def norm_names(network: nn.Module, kinds: tuple[type[nn.Module], ...] = NORMS) -> list[str]:
    """Names of the norm layers of a network, in module order."""
    return [name for name, module in network.named_modules() if isinstance(module, kinds)]


def is_under(name: str, roots: Iterable[str]) -> bool:
    """Whether `name` is one of `roots` or inside one: `layer1.0.bn1` is under `layer1`, `layer10` is not."""
    return any(name == root or name.startswith(f"{root}.") for root in roots)
