"""main.py on the tokens of a tokenizer, in the place of a text."""

import json

import numpy as np
import pytest

ROWS = "metrics.jsonl"


@pytest.fixture(scope="module")
def numbers(text):
  """The bytes of the text as numbers."""
  return np.frombuffer(text.read_bytes(), np.uint8)


def folder(path, dtype, train, val):
  path.mkdir()
  train.astype(dtype).tofile(path / "train.bin")
  val.astype(dtype).tofile(path / "val.bin")
  return path


def trained(main, flags, workdir, *more):
  code, out, err = main(*flags, f"--workdir={workdir}", *more)
  assert code == 0, err
  lines = (workdir / ROWS).read_text().splitlines()
  return out, [json.loads(line) for line in lines]


def losses(rows):
  return [(row["step"], row["split"], row["loss"]) for row in rows]


@pytest.mark.every_case
def test_tokens_that_are_bytes_train_as_bytes_do(
  main, tiny_flags, numbers, tmp_path
):
  """The losses are those of the text, to the bit, whatever stores them."""
  valid = 5 * len(numbers) // 100
  train, val = numbers[: -2 * valid], numbers[-2 * valid : -valid]
  flags = [*tiny_flags, "--config.steps=6"]
  _, expected = trained(main, flags, tmp_path / "text")
  np.save(tmp_path / "a.npy", numbers.astype(np.int64))
  for path in (
    folder(tmp_path / "u2", "<u2", train, val),
    tmp_path / "a.npy",
  ):
    out, found = trained(
      main,
      [*flags, f"--config.data.cache_dir={tmp_path / 'cache'}"],
      tmp_path / f"run_{path.name}",
      f"--config.data.path={path}",
    )
    assert losses(found) == losses(expected)
    assert f"train {len(train):,}, valid {valid:,}, test " in out
    assert " tokens\n" in out and "lzma" not in out
    for row, of_text in zip(found, expected, strict=True):
      assert row["bits_per_token"] == of_text["bits_per_char"]
      assert not {"bits_per_char", "bits_per_byte", "bytes"} & row.keys()


def test_a_run_on_tokens(main, tiny_flags, numbers, tmp_path):
  """It trains, goes on, is evaluated and writes, in units of its own."""
  tokens = numbers.astype(np.int64) * 3  # beyond the bytes
  owt = folder(tmp_path / "owt", "<u4", tokens[:-2_000], tokens[-2_000:])
  flags = [
    *tiny_flags,
    f"--config.data.path={owt}",
    f"--config.data.cache_dir={tmp_path / 'cache'}",
    "--config.data.bytes_per_token=4",
    "--config.sample_every_steps=6",
  ]
  run = tmp_path / "run"
  largest = tokens.max()
  for few in (256, largest):
    few_flag = f"--config.model.vocab_size={few}"
    code, _, err = main(*flags, few_flag, f"--workdir={run}")
    assert code == 2
    assert f"={few} is not possible; expected more than {largest}" in err
  flags.append(f"--config.model.vocab_size={largest + 1}")
  trained(main, flags, run, "--config.steps=6")
  out, rows = trained(main, flags, run)
  assert "bpt " in out and "bpb " in out and "(resumed)" in out
  assert rows[-1]["bits_per_byte"] == rows[-1]["bits_per_token"] / 4
  line = next(x for x in out.splitlines() if x.startswith("sample"))
  assert line.split()[2:34] == [str(token) for token in tokens[-2_000:][:32]]

  code, out, err = main("--mode=eval", f"--workdir={run}")
  assert code == 0, err
  record = json.loads((run / "eval_valid.json").read_text())
  assert record["tokens"] == 1_999
  assert record["data"]["unit"] == "token"
  bits = record["bits_per_token"]
  assert f"{bits:.4f} +- {record['stderr']:.4f} bits per token" in out
  assert f"{bits / 4:.4f} per byte" in out
  assert f"{bits * np.log(2):.4f} nats per token" in out
  code, _, err = main("--mode=eval", f"--workdir={run}", "--split=test")
  assert (code, err.count("\n")) == (1, 1)
  assert "owt has no split test; add test.bin to it" in err

  sample = "--mode=sample", f"--workdir={run}", "--tokens=5", "--temperature=0"
  code, out, err = main(*sample, f"--prompt={tokens[0]} {tokens[1]}")
  assert code == 0, err
  written = (run / "sample.txt").read_text().splitlines()[1].split()
  assert written[:2] == [str(tokens[0]), str(tokens[1])]
  assert out.startswith(" ".join(written)) and len(written) == 7
  for prompt, said in (
    ("def", "'def' is not a token"),
    (f"{largest + 1}", f"the token {largest + 1} is not one of"),
    ("   ", "holds no token"),
  ):
    code, _, err = main(*sample, f"--prompt={prompt}")
    assert (code, err.count("\n")) == (1, 1)
    assert said in err


def test_a_setting_of_tokens_means_nothing_to_a_text(main, tiny_flags):
  code, _, err = main(*tiny_flags, "--config.data.bytes_per_token=4")
  assert (code, err.count("\n")) == (2, 1)
  assert "data.bytes_per_token=4.0 is not possible; expected 0, as the" in err


def test_a_model_of_tokens_does_not_take_a_text_that_it_does_not_know(
  main, tiny_flags, numbers, text, tmp_path
):
  few = numbers % 7
  path = folder(tmp_path / "few", "<u2", few[:-999], few[-999:])
  flags = [*tiny_flags, f"--config.data.path={path}", "--config.steps=1"]
  flags += [
    f"--config.data.cache_dir={tmp_path}",
    "--config.model.vocab_size=7",
  ]
  trained(main, flags, tmp_path / "run")
  code, _, err = main(
    "--mode=eval", f"--workdir={tmp_path / 'run'}", f"--config.data.path={text}"
  )
  assert (code, err.count("\n")) == (2, 1)
  assert "vocab_size=7 is not possible; expected more than 255" in err
