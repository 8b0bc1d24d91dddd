"""The method's place in PEFT, and a save that leaves the old adapter whole."""

import copy
import json
import os
import pickle
import signal
import stat
import subprocess
import sys

import peft
import peft.peft_model
import pytest
import torch
from growing import growing
from increlora_rs import IncreLoraConfig, IncreLoraModel
from increlora_rs.tuner.registration import register
from peft import LoraConfig, PeftModel, PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

STAGE = ".increlora-save-*"

# The member of PeftType.


@pytest.mark.parametrize(
    "find",
    [
        lambda: PeftType("INCRELORA"),
        lambda: PeftType["INCRELORA"],
        lambda: PeftType.INCRELORA,
        lambda: next(member for member in PeftType if member == "INCRELORA"),
        lambda: PeftType.__members__["INCRELORA"],
        lambda: pickle.loads(pickle.dumps(growing().peft_type)),
        lambda: copy.deepcopy(growing().peft_type),
        lambda: list(PeftType)[list(PeftType).index("INCRELORA")],
    ],
    ids=["value", "name", "attribute", "iteration", "members", "pickle", "deepcopy", "list"],
)
def test_member_is_one_and_the_same_however_found(find):
    assert find() is growing().peft_type


def test_member_is_a_string_as_the_others_are():
    member = PeftType("INCRELORA")
    assert (type(member), member.value, member.name, json.dumps(member)) == (
        PeftType,
        "INCRELORA",
        "INCRELORA",
        '"INCRELORA"',
    )


def test_other_members_are_as_they_were():
    assert PeftType("LORA") is PeftType.LORA
    assert len(set(PeftType)) == len(list(PeftType)) == len(PeftType.__members__)


@pytest.mark.parametrize(
    ("mapping", "wanted"),
    [(PEFT_TYPE_TO_CONFIG_MAPPING, IncreLoraConfig), (PEFT_TYPE_TO_TUNER_MAPPING, IncreLoraModel)],
    ids=["config", "tuner"],
)
@pytest.mark.parametrize("key", ["INCRELORA", PeftType("INCRELORA")])
def test_classes_are_found_by_member_and_by_string(mapping, wanted, key):
    assert mapping[key] is wanted


def test_registering_again_changes_nothing():
    members, save = list(PeftType), PeftModel.save_pretrained
    register()
    assert list(PeftType) == members
    assert PeftModel.save_pretrained is save


def test_method_of_the_same_name_from_elsewhere_is_refused(monkeypatch):
    monkeypatch.setitem(PEFT_TYPE_TO_CONFIG_MAPPING, PeftType("INCRELORA"), LoraConfig)
    with pytest.raises(ImportError, match=r"INCRELORA.*peft.tuners.lora"):
        register()


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_import_in_a_new_process_registers_the_method():
    done = python("import increlora_rs, peft; print(peft.get_peft_config({'peft_type': 'INCRELORA'}).r)")
    assert (done.returncode, done.stdout.split()) == (0, ["8"])


# Saving.


def configure(form=IncreLoraConfig, **kwargs):
    return form(**({"target_modules": ["lin0", "lin1"], "r": 3, "lora_alpha": 6} | kwargs))


@pytest.fixture
def model(make_plain, grow):
    model = get_peft_model(make_plain(), configure())
    grow(model, {"lin0": 2, "lin1": 1})
    return model.eval()


@pytest.fixture
def outputs(make_plain, plain_input):
    """``outputs(directory)``: what the adapter saved there computes."""
    return lambda path: PeftModel.from_pretrained(make_plain(), path).eval()(plain_input)


@pytest.fixture
def before(model, grow, tmp_path, outputs):
    """Outputs of the adapter saved in ``tmp_path``; ``model`` has grown since."""
    model.save_pretrained(tmp_path)
    found = outputs(tmp_path)
    grow(model, {"lin0": 5, "lin1": 3}, seed=1)
    return found


def fail(*args, **kwargs):
    raise OSError("no space left on device")


def fail_at(call, function, action=fail):
    """``function`` that does ``action`` in place of its ``call``-th call."""
    calls = 0

    def run(*args, **kwargs):
        nonlocal calls
        calls += 1
        return action(*args, **kwargs) if calls == call else function(*args, **kwargs)

    return run


def half_written(tensors, path, **kwargs):
    with open(path, "wb") as file:
        file.write(b"\x40\x00\x00\x00")
    fail()


FAILURES = {
    "weights": lambda patch: patch.setattr(peft.peft_model, "safe_save_file", half_written),
    "configuration": lambda patch: patch.setattr(IncreLoraConfig, "save_pretrained", fail),
    "card": lambda patch: patch.setattr(PeftModel, "create_or_update_model_card", fail),
    "sync": lambda patch: patch.setattr(os, "fsync", fail),
    "replace 1": lambda patch: patch.setattr(os, "replace", fail_at(1, os.replace)),
    "replace 2": lambda patch: patch.setattr(os, "replace", fail_at(2, os.replace)),
    "replace 3": lambda patch: patch.setattr(os, "replace", fail_at(3, os.replace)),
}
failures = pytest.mark.parametrize("arrange", FAILURES.values(), ids=FAILURES)


@failures
def test_failed_save_leaves_the_old_adapter(model, before, tmp_path, outputs, monkeypatch, arrange):
    with monkeypatch.context() as patch:
        arrange(patch)
        with pytest.raises(OSError, match="no space left"):
            model.save_pretrained(tmp_path)
    assert torch.equal(outputs(tmp_path), before)


@failures
def test_failed_save_leaves_nothing_behind(model, before, tmp_path, monkeypatch, arrange):
    names = sorted(path.name for path in tmp_path.iterdir())
    with monkeypatch.context() as patch:
        arrange(patch)
        with pytest.raises(OSError):
            model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == names


@failures
def test_save_after_a_failed_one_gives_the_new_adapter(
    model, before, plain_input, tmp_path, outputs, monkeypatch, arrange
):
    with monkeypatch.context() as patch:
        arrange(patch)
        with pytest.raises(OSError):
            model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(tmp_path), model(plain_input))


def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def half_written_and_killed(tensors, path, **kwargs):
    with open(path, "wb") as file:
        file.write(b"\x40\x00\x00\x00")
        file.flush()
        kill()


KILLS = {
    "weights": lambda: setattr(peft.peft_model, "safe_save_file", half_written_and_killed),
    "replace 1": lambda: setattr(os, "replace", fail_at(1, os.replace, kill)),
    "replace 2": lambda: setattr(os, "replace", fail_at(2, os.replace, kill)),
    "replace 3": lambda: setattr(os, "replace", fail_at(3, os.replace, kill)),
}
kills = pytest.mark.parametrize("arrange", KILLS.values(), ids=KILLS)


def killed_in_a_child(arrange, save):
    child = os.fork()
    if child == 0:
        try:
            arrange()
            save()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@kills
def test_killed_save_leaves_the_old_adapter(model, before, tmp_path, outputs, arrange):
    assert killed_in_a_child(arrange, lambda: model.save_pretrained(tmp_path))
    assert torch.equal(outputs(tmp_path), before)


@kills
def test_save_after_a_killed_one_cleans_up(model, before, tmp_path, arrange):
    killed_in_a_child(arrange, lambda: model.save_pretrained(tmp_path))
    assert len(list(tmp_path.glob(STAGE))) == 1
    model.save_pretrained(tmp_path)
    assert list(tmp_path.glob(STAGE)) == []


@kills
def test_save_after_a_killed_one_gives_the_new_adapter(
    model, before, plain_input, tmp_path, outputs, arrange
):
    killed_in_a_child(arrange, lambda: model.save_pretrained(tmp_path))
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(tmp_path), model(plain_input))


def test_process_that_is_not_the_main_one_leaves_a_running_save_alone(
    model, before, plain_input, tmp_path, outputs, monkeypatch
):
    save_file = peft.peft_model.safe_save_file

    def save_while_another_process_saves(*args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(peft.peft_model, "safe_save_file", save_file)
            model.save_pretrained(tmp_path, is_main_process=False)
        save_file(*args, **kwargs)

    monkeypatch.setattr(peft.peft_model, "safe_save_file", save_while_another_process_saves)
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(tmp_path), model(plain_input))


def test_process_that_is_not_the_main_one_writes_nothing(model, tmp_path):
    model.save_pretrained(tmp_path / "adapter", is_main_process=False)
    files = [path for path in (tmp_path / "adapter").rglob("*") if path.is_file()]
    assert files == []


def test_model_card_that_exists_is_kept(model, tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# My adapter\n\nTrained on rainy days.\n")
    model.save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "Trained on rainy days." in card
    assert "license: mit" in card


def test_other_files_of_the_directory_are_kept(model, tmp_path):
    (tmp_path / "optimizer.pt").write_bytes(b"state")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "notes.txt").write_text("keep")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "optimizer.pt").read_bytes() == b"state"
    assert (tmp_path / "sub" / "notes.txt").read_text() == "keep"


@pytest.mark.parametrize("convert", [str, lambda path: path, lambda path: f"{path}{os.sep}"])
def test_directory_is_made_and_may_be_given_as_string_or_path(model, tmp_path, outputs, convert, plain_input):
    model.save_pretrained(convert(tmp_path / "a" / "b"))
    assert torch.equal(outputs(tmp_path / "a" / "b"), model(plain_input))


def test_relative_directory_and_keyword_are_taken(model, tmp_path, outputs, monkeypatch, plain_input):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained(save_directory="adapter")
    assert torch.equal(outputs(tmp_path / "adapter"), model(plain_input))


def test_path_of_a_file_is_refused(model, tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(ValueError, match="should be a directory"):
        model.save_pretrained(tmp_path / "file")


@pytest.mark.parametrize("adapter_name", ["default", "other"])
def test_saved_files_are_those_of_plain_lora_with_its_permissions(make_plain, tmp_path, adapter_name):
    listings = []
    for name, config in (("lora", LoraConfig(target_modules=["lin0"])), ("ours", configure())):
        saved = get_peft_model(make_plain(), config, adapter_name=adapter_name)
        saved.save_pretrained(tmp_path / name)
        paths = sorted((tmp_path / name).rglob("*"))
        listings.append(
            [(str(p.relative_to(tmp_path / name)), stat.S_IMODE(p.stat().st_mode)) for p in paths]
        )
    assert listings[0] == listings[1]


def test_selected_adapter_alone_is_saved(model, tmp_path):
    model.add_adapter("other", configure())
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "other"]


def test_plain_lora_model_is_saved_straight_to_its_directory(make_plain, tmp_path, monkeypatch):
    written = []
    save_file = peft.peft_model.safe_save_file
    monkeypatch.setattr(
        peft.peft_model,
        "safe_save_file",
        lambda tensors, path, **kwargs: (written.append(str(path)), save_file(tensors, path, **kwargs)),
    )
    get_peft_model(make_plain(), LoraConfig(target_modules=["lin0"])).save_pretrained(str(tmp_path))
    assert written == [str(tmp_path / "adapter_model.safetensors")]


def test_plain_lora_model_comes_back_as_always(make_plain, tmp_path, plain_input, outputs):
    model = get_peft_model(make_plain(), LoraConfig(target_modules=["lin0"], init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(tmp_path), model.eval()(plain_input))
