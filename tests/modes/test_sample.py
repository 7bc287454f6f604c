"""Texts with which main.py continues a prompt."""

from adaptive_attention.modes import sample


def test_a_prompt_of_bytes_that_are_no_text():
  typed = b"caf\xe9 \xff".decode("utf-8", "surrogateescape")
  assert sample.read_prompt(typed, None) == (b"caf\xe9 \xff", "--prompt")


def test_the_mode(main, tiny_flags, tmp_path):
  code, _, err = main(
    *tiny_flags,
    "--config.model.position=rotary",
    "--config.model.vocab_size=300",  # of which only bytes are written
    f"--workdir={tmp_path}",
  )
  assert code == 0, err

  def sample(*flags):
    return main("--mode=sample", f"--workdir={tmp_path}", *flags)

  code, out, err = sample("--prompt=query key ", "--tokens=40", "--seed=3")
  assert code == 0, err
  written = (tmp_path / "sample.txt").read_text()
  text = written.split("\n", 1)[1].rstrip("\n")
  assert text.startswith("query key ")
  assert out.startswith(text)
  assert "keys read per token" in out
  (tmp_path / "prompt").write_bytes(b"query key ")
  code, out, err = sample(
    f"--prompt_file={tmp_path / 'prompt'}", "--tokens=40", "--seed=3", "--num=3"
  )
  assert code == 0, err
  assert out.startswith(text)
  assert out.count("--- ") == 2
  assert (tmp_path / "sample.txt").read_text().count("--- ") == 3
  for flags, said in (
    ([], "needs one of --prompt"),
    (["--prompt=a", "--prompt_file=b"], "needs one of --prompt"),
    (["--prompt="], "--prompt is empty"),
    ([f"--prompt_file={tmp_path / 'none'}"], "cannot be read (No such file"),
    ([f"--prompt_file={tmp_path}"], "cannot be read (Is a directory)"),
    (["--prompt=a", "--top_p=0"], "top_p=0.0 is not possible"),
    (["--prompt=a", "--num=99999999"], "tokens takes"),
    (["--prompt=a", "--split=test"], "means nothing to --mode=sample"),
  ):
    code, _, err = sample(*flags)
    assert code in (1, 2)
    assert said in err
    assert err.count("\n") == 1
