"""A small DeepSeek-V3 from disk with our blocks in it, against transformers in float32."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_its_arguments(tmp_path, monkeypatch, capsys):
    from examples import deepseek_end_to_end

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(deepseek_end_to_end, "compare", lambda folder: {folder.name: 1.0})
    for arguments, code in ((["--help"], 0), (["--halp"], 2), (["a", "b"], 2), (["/proc/x"], 2)):
        with pytest.raises(SystemExit) as raised:
            deepseek_end_to_end.main(arguments)
        assert raised.value.code == code
    shown = capsys.readouterr()
    assert "[-h] [FOLDER]" in shown.out
    assert "FOLDER: /proc/x: cannot be used: No such file or directory" in shown.err
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    for name, said in (("", "expected a folder, got an empty name"), ("a" * 300, "too long")):
        with pytest.raises(SystemExit, match="2"):
            deepseek_end_to_end.main([name])
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        deepseek_end_to_end.main([str(tmp_path / "file")])
    assert "file: cannot be used: expected a folder, got a file" in capsys.readouterr().err
    deepseek_end_to_end.main([str(tmp_path / "new")])
    assert capsys.readouterr().out.startswith("new ")
    (tmp_path / "new" / "config.json").write_text("{}")
    with pytest.raises(SystemExit):
        deepseek_end_to_end.main([str(tmp_path / "new")])
    assert "expected an empty or new folder, got config.json in it" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_deepseek_v3(tmp_path):
    from examples import deepseek_end_to_end

    figures = deepseek_end_to_end.compare(tmp_path, backend="xla")
    print(figures)
    assert figures["routed_error"] < 0.05
    assert figures["equal_ids"] >= 0.999
    # Random logits are flat: most of what is lost is lost by bfloat16 alone.
    assert figures["cosine_mean"] > figures["bf16_cosine_mean"] - 0.02
    assert figures["top1_agreement"] > figures["bf16_top1_agreement"] - 0.15
    assert figures["kl_mean"] < 0.005
