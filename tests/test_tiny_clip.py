import torch

from ballad_hf.conversion.tiny_clip import build_tiny_clip


def test_known_words_are_one_token_and_others_are_spelt():
    tokenizer = build_tiny_clip(words=["photo", "cat"]).tokenizer
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    ids = tokenizer("cat")["input_ids"]
    assert ids[0] == begin
    assert ids[-1] == end
    assert len(ids) == 3
    assert len(tokenizer("dog")["input_ids"]) == 2 + 3
    assert tokenizer.unk_token_id not in tokenizer("Ärger 7 ☃")["input_ids"][1:-1]


def test_the_end_token_has_the_highest_id():
    tokenizer = build_tiny_clip().tokenizer
    assert tokenizer.eos_token_id == len(tokenizer) - 1


def test_the_seed_alone_decides_the_weights():
    torch.manual_seed(5)
    expected_next = torch.rand(1)
    torch.manual_seed(5)
    first = build_tiny_clip(seed=3).clip.state_dict()
    assert torch.equal(torch.rand(1), expected_next)
    second = build_tiny_clip(seed=3).clip.state_dict()
    other = build_tiny_clip(seed=4).clip.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["visual_projection.weight"], other["visual_projection.weight"])
