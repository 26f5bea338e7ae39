"""Named settings: the key `variant` makes a rule what one publication has, below whatever is written beside it.

    rule: muon, variant: moonlight, lr: 3e-4       Moonlight's switches and weight decay, with another learning rate

A variant is a set of values and nothing else: the rule that it makes holds them all, beside the variant's name, and
a configuration written out from it reads back as the same rule. What a publication moves over a run, such as the
momentum of the speedrun from record 9 on, is no setting but a schedule (`scheduled`).
"""
import dataclasses
from typing import Any

from pydantic_core import ArgsKwargs

# By rule and variant. Commits: KellerJordan/Muon 857d1ad, KellerJordan/modded-nanogpt f411b3d, microsoft/dion 0a059a4.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "muon": {
        # KellerJordan/Muon muon.py
        "kj": dict(lr=0.02, momentum=0.95, momentum_form="ema", nesterov=True, ns_coefficients="kj5",
                   scale="spectral", weight_decay=0.0, decay="lr"),
        # MoonshotAI/Moonlight examples/toy_train.py; arXiv:2502.16982. The learning rate is AdamW's.
        "moonlight": dict(lr=1e-3, momentum=0.95, momentum_form="sgd", nesterov=True, ns_coefficients="kj5",
                          scale="rms", weight_decay=0.1, decay="lr"),
        # torch.optim.Muon, 2.9 and later, torch/optim/_muon.py
        "torch": dict(lr=1e-3, momentum=0.95, momentum_form="ema", nesterov=True, ns_coefficients="kj5",
                      scale="spectral", weight_decay=0.1, decay="lr"),
        # microsoft/dion dion/muon.py; its training script turns Nesterov on.
        "dion": dict(lr=0.01, momentum=0.95, momentum_form="sgd", nesterov=False, ns_coefficients="polar_express5",
                     scale="unclamped", weight_decay=0.01, decay="lr"),
        # modded-nanogpt records/track_1_short/2024-10-10_Muon; the same numbers until record 7
        "record4": dict(lr=0.00036, momentum=0.95, momentum_form="sgd", nesterov=True, ns_coefficients="kj5",
                        scale="rms1", weight_decay=0.0, decay="lr"),
        # modded-nanogpt records/track_1_short/2024-11-03_UntieEmbed; from record 9 on the momentum rises from .85
        # to .95 over 500 steps, which `scheduled` says.
        "record8": dict(lr=0.02, momentum=0.95, momentum_form="sgd", nesterov=True, ns_coefficients="kj5",
                        scale="spectral", weight_decay=0.0, decay="lr"),
        # modded-nanogpt records/track_3_optimization/train_gpt_simple.py, the tuned baseline, result #36
        "track3": dict(lr=0.025, momentum=0.95, momentum_form="ema", nesterov=True, ns_coefficients="exact12",
                       scale="spectral", weight_decay=0.05, decay="lr"),
    },
    "normuon": {
        # arXiv:2510.05491, Algorithm 1. The paper adds 1e-10 to √v, here v is kept from falling below its square.
        # Its learning rate is one for AdamW's units, RMS .2: the value is AdamW's usual one and not the paper's.
        "paper": dict(lr=1e-3, momentum=0.95, momentum_form="ema", nesterov=False, ns_coefficients="kj5",
                      beta2=0.95, eps=1e-20, statistic="rows", restore="orthogonal", scale="rms",
                      weight_decay=0.0, decay="lr"),
        # modded-nanogpt records/track_1_short/2025-10-24_NorMuon. Its √max(1, rows/cols) is of shapes in memory, where
        # no matrix is tall: mlp_in lies transposed from record 27 on. Its momentum is scheduled: .85 to .95 over
        # 300 steps, back to .85 over the last 50.
        "record41": dict(lr=0.06, momentum=0.95, momentum_form="ema", nesterov=True, ns_coefficients="polar_express5",
                         beta2=0.95, eps=1e-10, statistic="longer", restore="update", scale="none",
                         weight_decay=0.0, decay="lr"),
        # modded-nanogpt records/track_3_optimization, result #10, orthogonalised as in the track's baseline
        "track3": dict(lr=0.035, momentum=0.95, momentum_form="ema", nesterov=True, ns_coefficients="exact12",
                       beta2=0.95, eps=1e-10, statistic="longer", restore="update", scale="spectral",
                       weight_decay=0.025, decay="lr"),
    },
}


def with_variant(cls: type, given: Any) -> Any:
    """What `cls` is made from, `given` to pydantic: a dict or a call's arguments, with its variant's settings added.

    Raises:
        ValueError: the variant is another rule's.
    """
    call = isinstance(given, ArgsKwargs)
    written = given.kwargs or {} if call else given
    name = written.get("variant") if isinstance(written, dict) else None
    if not isinstance(name, str):
        return given                                     # no variant, or none that pydantic will let pass
    elsewhere = [rule for rule, known in VARIANTS.items() if name in known and known is not cls.VARIANTS]
    if name not in cls.VARIANTS and elsewhere:
        raise ValueError(f"variant {name!r} is one of rule {elsewhere[0]}; write rule: {elsewhere[0]}, "
                         f"or one of {', '.join(cls.VARIANTS)}")
    by_position = [field.name for field in dataclasses.fields(cls)][:len(given.args) if call else 0]
    settings = {key: value for key, value in cls.VARIANTS.get(name, {}).items() if key not in by_position}
    return ArgsKwargs(given.args, {**settings, **written}) if call else {**settings, **written}
