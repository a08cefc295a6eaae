"""Reading audio embeddings as tokens: loss and gradients against torch's own over all logits at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qwen2audio_train.model import ctc
from qwen2audio_train.model.ctc import CtcHead

VOCAB, WIDTH = 40, 12
SPOKEN = torch.arange(3, VOCAB)
"""Three rows are special tokens."""

LENGTHS = [9, 5, 14, 6]
TRANSCRIPTS = [[4, 4, 7], [], [9, 30, 4, 39, 12], [3]]


@pytest.fixture
def head() -> CtcHead:
    torch.manual_seed(0)
    head = CtcHead(WIDTH, SPOKEN)
    for parameter in head.parameters():
        nn.init.normal_(parameter, mean=0.5)
    return head


@pytest.fixture
def table() -> nn.Embedding:
    torch.manual_seed(1)
    return nn.Embedding(VOCAB, WIDTH)


def frames() -> Tensor:
    return torch.randn(sum(LENGTHS), WIDTH, generator=torch.Generator().manual_seed(2)).requires_grad_()


def transcripts() -> tuple[Tensor, Tensor]:
    tokens = [token for row in TRANSCRIPTS for token in row]
    return torch.tensor(tokens), torch.tensor([len(row) for row in TRANSCRIPTS])


def reference(head: CtcHead, table: nn.Embedding, audio: Tensor) -> Tensor:
    """Clip by clip, every logit of the vocabulary at once."""
    loss = audio.new_zeros(())
    for clip, tokens in zip(audio.split(LENGTHS), TRANSCRIPTS, strict=True):
        if not tokens:
            continue
        scores = clip @ table.weight[SPOKEN].detach().T * head.scale
        logits = torch.cat([(clip @ head.blank + head.blank_bias).unsqueeze(1), scores], 1)
        labels = torch.searchsorted(SPOKEN, torch.tensor(tokens)) + 1
        sizes = torch.tensor(len(clip)), torch.tensor(len(tokens))
        loss = loss + F.ctc_loss(logits.log_softmax(1), labels, *sizes, reduction="sum")
    return loss


def gradients(loss: Tensor, head: CtcHead, audio: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [audio, *head.parameters()]))


@pytest.mark.parametrize("chunk_bytes", [2**29, 4 * sum(LENGTHS) * 7], ids=["whole", "chunks of tokens"])
def test_loss_and_gradients_are_those_of_all_logits(
    head: CtcHead, table: nn.Embedding, chunk_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctc, "LOGIT_BYTES", chunk_bytes)
    audio = frames()
    loss = head(audio, LENGTHS, *transcripts(), table)
    expected = reference(head, table, audio)
    assert torch.allclose(loss, expected, rtol=1e-5, atol=0.0)
    for found, wanted in zip(gradients(loss, head, audio), gradients(expected, head, audio), strict=True):
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    assert table.weight.grad is None


def test_a_sample_of_everything_is_the_whole_vocabulary(head: CtcHead, table: nn.Embedding) -> None:
    audio = frames()
    whole = head(audio, LENGTHS, *transcripts(), table)
    shuffled = SPOKEN[torch.randperm(len(SPOKEN))]
    assert torch.allclose(head(audio, LENGTHS, *transcripts(), table, shuffled), whole, rtol=1e-6, atol=0.0)
    assert head.draw(len(SPOKEN), 0) is None
    assert head.draw(0, 0) is None


def test_a_sample_stands_for_the_tokens_that_it_was_drawn_from(head: CtcHead, table: nn.Embedding) -> None:
    """The mean over samples of the summed exponentials is their sum over the vocabulary."""
    used = transcripts()[0].unique()
    audio = frames().detach()
    whole = head.log_probs(audio, used, table, None)
    odds = whole[:, -1] - whole[:, 0]  # of any other token against the blank
    draws = [head.log_probs(audio, used, table, head.draw(12, seed)) for seed in range(2000)]
    mean = torch.stack([(draw[:, -1] - draw[:, 0]).exp() for draw in draws]).mean(0).log()
    assert torch.allclose(mean, odds, atol=0.15)


def test_samples_follow_from_their_seed(head: CtcHead) -> None:
    first, again, other = head.draw(12, 5), head.draw(12, 5), head.draw(12, 6)
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert len(first.unique()) == 12
    assert torch.isin(first, SPOKEN).all()


def test_read_takes_the_likeliest_token_of_each_frame(head: CtcHead, table: nn.Embedding) -> None:
    with torch.no_grad():
        head.blank.zero_()
        head.blank_bias.fill_(0.1)
        head.scale.fill_(1.0)
        table.weight.copy_(torch.eye(VOCAB, WIDTH))
    said = [5, 5, None, 5, 1, 6, 6, None, None]  # 1 is a special token, which nobody says
    audio = torch.stack([torch.zeros(WIDTH) if token is None else table.weight[token] for token in said])
    read = head.read(audio, [4, 5], table)
    assert [ids.tolist() for ids in read] == [[5, 5], [6]]


def test_without_a_transcript_every_parameter_has_a_gradient_of_zero(head: CtcHead, table: nn.Embedding) -> None:
    """So that ranks without one take part in every reduction."""
    audio = frames()
    nothing = torch.zeros(0, dtype=torch.long), torch.zeros(len(LENGTHS), dtype=torch.long)
    loss = head(audio, LENGTHS, *nothing, table)
    assert loss == 0
    assert all(not grad.any() for grad in gradients(loss, head, audio))


def test_a_transcript_longer_than_its_frames_counts_as_zero(head: CtcHead, table: nn.Embedding) -> None:
    audio = frames()
    rows = torch.arange(4, 11), torch.tensor([0, 7, 0, 0])  # five frames
    loss = head(audio, LENGTHS, *rows, table)
    assert loss == 0
    assert all(torch.isfinite(grad).all() for grad in gradients(loss, head, audio))
