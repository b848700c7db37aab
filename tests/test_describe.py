"""``describe`` and the commands ``list`` and ``describe``."""

import pytest

import lossfns
from lossfns import LossInputError, describe
from lossfns.cli import main
from lossfns.describe import families, makers, presets


@pytest.mark.parametrize("name", presets())
def test_a_description_has_the_equation_the_columns_and_the_statistics(name: str) -> None:
    text, loss = describe(name), presets()[name]()
    assert repr(loss) in text and text == describe(presets()[name]) == describe(loss)
    assert all(f"``{column}``" in text for column in loss.reads)
    assert "Args:" in text and ("tatistic" in text)
    assert all(f"{knob}: " in text or f"{knob}, " in text for knob in loss.knobs)


def test_the_settings_of_a_loss_are_shown() -> None:
    assert "ppo(clip=(0.9, 1.1)" in describe(lossfns.ppo(clip=(0.9, 1.1)).bind())
    assert "https://arxiv.org/abs/1707.06347" in describe("ppo")


@pytest.mark.parametrize("unknown", ["grpoo", 3, lossfns.evaluate])
def test_what_is_no_loss_is_refused(unknown: object) -> None:
    with pytest.raises(LossInputError, match="a loss of this library"):
        describe(unknown)


def test_the_hint_for_a_name() -> None:
    """A public function that makes no loss, and a name that is usual elsewhere, are no misspellings of another one."""
    for name, hint in (
        ("simpoo", "Did you mean 'simpo'?"),
        ("evaluate", "See help(lossfns.evaluate)."),
        ("sft", "Here it is cross_entropy."),
    ):
        with pytest.raises(LossInputError) as caught:
            describe(name)
        assert (caught.value.got, caught.value.fix) == (repr(name), hint)


def test_every_loss_is_listed_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = sorted(line.split(":")[0].strip() for line in lines if line.startswith("  "))
    assert listed == sorted(makers()) and {"mpo", "with_kl", "info_nce", "sum_losses"} < set(listed)
    assert sum(map(len, families().values())) == len(makers()) > len(presets())


def test_functions_of_other_losses_are_described_by_their_signature() -> None:
    assert "\n    mpo(preference, quality, coefficients=(0.8, 0.2, 1.0))\n" in describe("mpo")
    assert "kl=k3, " in describe("with_kl") and "**losses" in describe("sum_losses")
    assert "preference=dpo(" in describe(lossfns.mpo(lossfns.dpo(), lossfns.bco()))


def test_the_command_describes_and_refuses(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["describe", "dpo"]) == 0 and "log σ" in capsys.readouterr().out
    assert main(["describe", "dpoo"]) == 2 and "Did you mean 'dpo'" in capsys.readouterr().err
