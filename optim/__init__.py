"""Update rules by the names that configurations use."""
from optim.adam import Adam
from optim.adamuon import AdaMuon
from optim.adamw import AdamW
from optim.gluon import Gluon
from optim.klsoap import KLSOAP
from optim.lion import Lion
from optim.muon import Muon
from optim.muon2 import Muon2
from optim.muonclip import MuonClip
from optim.normuon import NorMuon
from optim.scion import Scion
from optim.sgd import SGD
from optim.shampoo import Shampoo
from optim.soap import SOAP
from optim.spectral import SpectralDescent
from optim.splus import SPlus

RULES = {"adam": Adam, "adamuon": AdaMuon, "adamw": AdamW, "gluon": Gluon, "klsoap": KLSOAP,
         "lion": Lion, "muon": Muon, "muon2": Muon2, "muonclip": MuonClip, "normuon": NorMuon, "scion": Scion,
         "sgd": SGD, "shampoo": Shampoo, "soap": SOAP, "spectral": SpectralDescent, "splus": SPlus}
