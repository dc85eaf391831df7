"""Comparison of outputs, and the fresh process that computes those of an artefact."""

from __future__ import annotations

import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

from finetune.errors import DiskError, InternalError
from finetune.exporters import fresh, proof
from finetune.exporters.deployed import Interface, build_program
from finetune.exporters.graph_files import write_program
from finetune.exporters.proof import check_comparison, compare, predict_fresh, predict_here
from finetune.exporters.source import ProofInputs, draw_random
from pretrained.catalog import Card, find_card
from tests.sweeps import slow_except

SURE = torch.tensor([[0.9, 0.1], [0.2, 0.8]])


def test_equal_outputs_agree() -> None:
    found = compare(SURE, SURE.clone())
    assert (found.max_difference, found.top1_identical, found.num_near_ties, found.holds) == (
        0.0,
        True,
        0,
        True,
    )


def test_a_difference_is_measured_and_refused() -> None:
    found = compare(SURE, SURE + torch.tensor([2e-4, 0.0]))
    assert found.max_difference == pytest.approx(2e-4, rel=1e-2)
    assert not found.holds
    with pytest.raises(
        InternalError, match=r"differ from the network's by up to 0\.0002 .*class of 0 differs"
    ):
        check_comparison("exporting", "the network's", found, 2, "judged images")


def test_another_class_in_a_near_tie_is_allowed_and_counted() -> None:
    tie, turned = torch.tensor([[0.50002, 0.49998]]), torch.tensor([[0.49999, 0.50001]])
    found = compare(tie, turned)
    assert (found.top1_identical, found.num_near_ties, found.num_top1_differences) == (True, 1, 1)
    assert found.holds


def test_another_class_without_a_near_tie_is_refused() -> None:
    found = compare(torch.tensor([[0.5004, 0.4996]]), torch.tensor([[0.4999, 0.5001]]), tolerance=6e-4)
    assert found.max_difference < found.tolerance
    assert not found.top1_identical
    assert not found.holds


def test_nan_never_agrees() -> None:
    for bad in (torch.full((2, 2), torch.nan), torch.tensor([[0.9, 0.1], [0.2, torch.nan]])):
        assert not compare(SURE, bad).holds
        assert not compare(bad, SURE).holds


def test_one_class_is_never_a_tie() -> None:
    found = compare(torch.ones(3, 1), torch.ones(3, 1))
    assert (found.holds, found.num_near_ties) == (True, 0)


def test_batches_begin_with_odd_sizes_and_cover_everything() -> None:
    batches = list(fresh.slice_batches(40))
    assert [batch.stop - batch.start for batch in batches] == [1, 3, 16, 16, 4]
    assert list(fresh.slice_batches(1)) == [slice(0, 1)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Card, torch.nn.Module, Path]:
    torch.manual_seed(0)
    network = timm.create_model("test_resnet").eval()
    card = find_card("timm/test_resnet")
    folder = tmp_path_factory.mktemp("program")
    return card, network, write_program(build_program(network, card, Interface()), folder)


@pytest.mark.slow
def test_a_fresh_process_gives_the_same_probabilities(written: tuple[Card, torch.nn.Module, Path]) -> None:
    card, network, path = written
    inputs = ProofInputs(draw_random(card, "").views[:5], None, 0)
    found, facts = predict_fresh("torch-export", path, inputs, card, Interface())
    assert facts["loaded"] == []
    expected = predict_here(network, card, inputs.views)
    assert compare(expected, found).holds
    assert expected.argmax(1).tolist() == found.argmax(1).tolist()
    with torch.no_grad():
        network.fc.bias[3] += 1  # type: ignore[operator,union-attr]
    try:
        assert not compare(predict_here(network, card, inputs.views), found).holds
    finally:
        with torch.no_grad():
            network.fc.bias[3] -= 1  # type: ignore[operator,union-attr]


@pytest.mark.slow
def test_an_artefact_that_cannot_be_loaded_fails_with_the_loaders_message(
    written: tuple[Card, torch.nn.Module, Path], tmp_path: Path
) -> None:
    card = written[0]
    (tmp_path / "model.pt2").write_bytes(b"nothing")
    inputs = ProofInputs(draw_random(card, "").views[:1], None, 0)
    with pytest.raises(InternalError, match=r"a fresh process could not load and run it: .+"):
        predict_fresh("torch-export", tmp_path / "model.pt2", inputs, card, Interface())


@pytest.mark.slow
def test_a_process_that_imports_finetune_proves_nothing(
    written: tuple[Card, torch.nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, _, path = written
    program = tmp_path / "spoiled.py"
    text = (
        Path(fresh.__file__).read_text().replace("import numpy as np", "import numpy as np\nimport finetune")
    )
    program.write_text(text)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setattr(fresh, "__file__", str(program))
    inputs = ProofInputs(draw_random(card, "").views[:1], None, 0)
    with pytest.raises(InternalError, match="imported finetune, so it proves nothing"):
        predict_fresh("torch-export", path, inputs, card, Interface())


@pytest.mark.slow
def test_too_few_outputs_are_refused(
    written: tuple[Card, torch.nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    card, _, path = written
    program = tmp_path / "lazy.py"
    text = Path(fresh.__file__).read_text().replace("np.concatenate(outputs)", "np.concatenate(outputs)[1:]")
    program.write_text(text)
    monkeypatch.setattr(fresh, "__file__", str(program))
    inputs = ProofInputs(draw_random(card, "").views[:2], None, 0)
    with pytest.raises(InternalError, match=r"gave \(1, 1000\) for 2 inputs"):
        predict_fresh("torch-export", path, inputs, card, Interface())


@pytest.mark.slow
@pytest.mark.parametrize("file", slow_except(["outputs.npy"], ["inputs.npy", "outputs.npy", "facts.json"]))
def test_a_full_disk_is_reported_as_such(
    written: tuple[Card, torch.nn.Module, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """Return the outputs of this process, and those of the fresh one."""
    card, _, path = written
    (tmp_path / "given" / file).parent.mkdir()
    (tmp_path / "given" / file).symlink_to("/dev/full")
    monkeypatch.setattr(proof, "temporary_folder", lambda _: nullcontext(tmp_path / "given"))
    inputs = ProofInputs(draw_random(card, "").views[:1], None, 0)
    with pytest.raises(DiskError, match="writing images for the comparison into") as caught:
        predict_fresh("torch-export", path, inputs, card, Interface())
    assert "TMPDIR" in caught.value.fix


def test_a_missing_temporary_folder_is_reported(
    written: tuple[Card, torch.nn.Module, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    card, _, path = written
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    inputs = ProofInputs(draw_random(card, "").views[:1], None, 0)
    with pytest.raises(DiskError, match="into /nowhere: No such file"):
        predict_fresh("torch-export", path, inputs, card, Interface())


@pytest.mark.parametrize("layout", [None, "nchw", "nhwc"])
def test_inputs_are_written_in_the_artefacts_layout(tmp_path: Path, layout: Any) -> None:
    card = find_card("timm/test_resnet")
    views = draw_random(card, "").views[:20]
    interface = Interface(layout)
    proof._write_inputs(tmp_path / "inputs.npy", views, card, interface)
    found = np.load(tmp_path / "inputs.npy", mmap_mode="r", allow_pickle=False)
    assert found.dtype == interface.input_dtype
    assert np.array_equal(found, interface.arrange(views, card.preprocessing).numpy())


def test_random_inputs_are_reproducible() -> None:
    card = find_card("timm/test_resnet")
    one, two = draw_random(card, "why").views, draw_random(card, "why").views
    assert one.equal(two)
    assert one.dtype == torch.uint8
    assert len(np.unique(one.numpy())) == 256
    assert sys.executable
