"""Update rules by the names that configurations use."""
from optim.adamw import AdamW
from optim.muon import Muon
from optim.splus import SPlus

RULES = {"adamw": AdamW, "muon": Muon, "splus": SPlus}
