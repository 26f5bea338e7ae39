"""What starting a process sets up."""
import torch
from torch._inductor.utils import run_fw_bw_and_get_code

from harness import processes


def test_a_compiled_gradient_is_summed_in_a_fixed_order_on_a_cpu():
    """An embedding's gradient adds up rows of equal tokens; atomic additions of several threads come in any order."""
    processes.start()
    embed = torch.nn.Embedding(50, 64, device="cpu")
    tokens = torch.arange(4096).view(8, -1) % 50
    torch._dynamo.reset()
    _, code = run_fw_bw_and_get_code(lambda: torch.compile(lambda t: embed(t).square().sum())(tokens))
    assert code and not any("atomic_add" in each for each in code)
    assert not torch.utils.deterministic.fill_uninitialized_memory                  # that would fill every buffer


def test_compilation_is_for_gpus_unless_asked_for_and_needs_a_compiler_on_a_cpu(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(processes.shutil, "which", lambda name: "/usr/bin/g++" if name == "g++" else None)
    assert [processes.compilation(asked, device) for asked in (None, True, False) for device in (cpu, gpu)] == [
        (False, "no"), (True, "yes"), (True, "yes"), (True, "yes"), (False, "no"), (False, "no")]
    monkeypatch.setattr(processes.shutil, "which", lambda name: None)
    assert processes.compilation(True, cpu) == (False, "no: torch.compile needs a C++ compiler and none was found")
    assert processes.compilation(True, gpu) == (True, "yes")
