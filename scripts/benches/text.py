"""Text benches: tokenising captions, the teacher's text pass, the student's text step.

Shapes: B captions per batch, N captions, L tokens, D embedding width.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from itertools import accumulate

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from benches.measure import BenchOptions, Row, in_own_process, medians, peak_memory_gb
from longclip_teacher import LongCLIP, create_teacher
from longclip_teacher.open_clip_parts import SimpleTokenizer
from longclip_teacher.open_clip_parts import TextTransformer as OpenClipText
from longclip_teacher.text import CONTEXT_LENGTH, EOT, SOT, CaptionTokenizer, caption_lengths
from mobileclip_student import create_student

__all__ = ["bench_student_text", "bench_teacher_text", "bench_tokenize", "random_captions"]

TEACHER = "b16"
TEACHER_MEANS = (100, 56, 12)  # tokens: long captions, medium ones, short ones
TEACHER_CAPTIONS, TEACHER_FULL_CAPTIONS = 64, 256
TEACHER_BATCHES = (8, 16, 32)  # of the baseline, which is timed at the best one
_SPREAD = 0.3  # standard deviation of the logarithm of a caption's length

STUDENT = "s0"
STUDENT_BATCH, STUDENT_MEAN = 32, 12

# captions, share with something other than plain ASCII in it
TOKENIZE_CASES = ((100_000, 0.1), (10_000, 1.0))
_BLOCK = 1000  # captions tokenised at a time
_WORDS_A_CAPTION = 78  # 95 tokens, including what is attached to words
_NUM_WORDS = 10_000
_ATTACHED = (*[","] * 5, *["."] * 5, ";", "'s", "-like")
_ODD = """café naïve jalapeño Zürich São é “quoted” it’s ‘so’ — – … ½ 25°C €5 🎉 👍🏽 👩\u200d👩\u200d👧 日本語 привет
Ｆｕｌｌ ﬁne & AT&T &amp; &quot;so&quot; &#39;s &eacute;clair"""
_ODD_PIECES = _ODD.split()
_BROKEN_PIECES = ["â€™", "cafÃ©", "a\x00b", "&amp;lt;"]  # one odd caption in a hundred


def bench_teacher_text(options: BenchOptions) -> Iterator[Row]:
    """Measure the teacher's text pass against open_clip's own tower on captions padded to 248."""
    count = TEACHER_FULL_CAPTIONS if options.full else TEACHER_CAPTIONS
    for mean in TEACHER_MEANS:
        yield in_own_process(teacher_text_case, mean, count, options)


@torch.no_grad()
def teacher_text_case(mean: int, count: int, options: BenchOptions) -> Row:
    """Measure distinct captions of `mean` tokens. The baseline's best batch is chosen on the first 32 of them."""
    torch.manual_seed(0)
    model = create_teacher(TEACHER).eval()
    del model.visual
    model.to(options.device)
    padded = padded_tower(model).to(options.device)
    tokens = random_captions(mean, count).to(options.device)

    def baseline(rows: Int[Tensor, "N L"], batch: int) -> Float[Tensor, "N D"]:
        return torch.cat([padded(part) for part in rows.split(batch)])

    with _autocast(options):
        largest = tokens[: max(TEACHER_BATCHES)]
        model.encode_text(largest), padded(largest[:8])  # warm-up
        trials = medians([_call(baseline, largest, batch) for batch in TEACHER_BATCHES], 1, options.device)
        best = TEACHER_BATCHES[trials.index(min(trials))]
        features: dict[str, Tensor] = {}
        ours, padded_time = medians(
            [
                lambda: features.update(ours=model.encode_text(tokens)),
                lambda: features.update(padded=baseline(tokens, best)),
            ],
            options.rounds,
            options.device,
        )
    difference = F.normalize(features["ours"].float(), dim=-1) - F.normalize(features["padded"].float(), dim=-1)
    mean_length = caption_lengths(tokens).float().mean()
    return Row(
        case=f"{TEACHER}, {count} captions of mean {mean_length:.0f}; 248 in batches of {best}",
        unit="captions/s",
        ours=count / ours,
        baseline=count / padded_time,
        ratio=padded_time / ours,
        max_abs_diff=difference.abs().max().item(),
        peak_gb=peak_memory_gb(),
    )


def padded_tower(model: LongCLIP) -> OpenClipText:
    """Build open_clip's causal text tower with the weights of `model`. It computes all positions of every caption."""
    config = model.config
    tower = OpenClipText(
        context_length=config.text.context_length,
        vocab_size=config.text.vocab_size,
        width=config.text.width,
        heads=config.text.heads,
        layers=config.text.layers,
        output_dim=config.embed_dim,
        act_layer=type(model.text.transformer.resblocks[0].mlp.gelu),
    )
    weights = model.text.state_dict()
    weights["positional_embedding"] = torch.cat(
        [weights.pop("frozen_positional_embedding"), weights["positional_embedding"]]
    )
    tower.load_state_dict(weights)
    return tower.eval()


def bench_student_text(options: BenchOptions) -> Iterator[Row]:
    """Measure the student's text pass, forward and backward, on short captions against the same padded to 248."""
    for pad_mask in (False, True):
        yield in_own_process(student_text_case, pad_mask, options)


def student_text_case(pad_mask: bool, options: BenchOptions) -> Row:
    """Measure a batch in training mode. The baseline attends to pads as published, or masks them (`pad_mask`)."""
    torch.manual_seed(0)
    trimmed = create_student(STUDENT).text_encoder.train().to(options.device)
    padded = create_student(STUDENT, pad_mask=pad_mask).text_encoder.train().to(options.device)
    padded.load_state_dict(trimmed.state_dict())
    padded.trim_captions = False
    tokens = random_captions(STUDENT_MEAN, STUDENT_BATCH).to(options.device)
    wanted = F.normalize(torch.randn(STUDENT_BATCH, trimmed.projection.shape[1]), dim=-1).to(options.device)

    def step(tower: nn.Module) -> Float[Tensor, "B D"]:
        tower.zero_grad(set_to_none=True)
        with _autocast(options):
            features = F.normalize(tower(tokens)[0].float(), dim=-1)
        (features - wanted).square().sum().backward()
        return features.detach()

    difference = step(trimmed) - step(padded)  # also the warm-up
    ours, baseline = medians([lambda: step(trimmed), lambda: step(padded)], options.rounds, options.device)
    mean = caption_lengths(tokens).float().mean()
    pads = "masked" if pad_mask else "as published"
    return Row(
        case=f"{STUDENT}, {STUDENT_BATCH} captions of mean {mean:.0f}; 248 with pads {pads}",
        unit="captions/s",
        ours=STUDENT_BATCH / ours,
        baseline=STUDENT_BATCH / baseline,
        ratio=baseline / ours,
        max_abs_diff=difference.abs().max().item() if pad_mask else None,
        peak_gb=peak_memory_gb(),
    )


def random_captions(mean: int, count: int) -> Int[Tensor, "N L"]:
    """Make distinct captions of random tokens at 248 columns. Lengths, SOT and EOT included, are lognormal about
    `mean`."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(count, generator=generator) * _SPREAD - _SPREAD**2 / 2
    lengths = (mean * spread.exp()).round().clamp(4, CONTEXT_LENGTH).long()[:, None]
    columns = torch.arange(CONTEXT_LENGTH)
    tokens = torch.randint(0, SOT, (count, CONTEXT_LENGTH), generator=generator)
    tokens = torch.where(columns < lengths - 1, tokens, torch.where(columns == lengths - 1, EOT, 0))
    tokens[:, 0] = SOT
    return tokens


def bench_tokenize(options: BenchOptions) -> Iterator[Row]:
    """Measure captions to a tensor of ids against open_clip's SimpleTokenizer."""
    for count, share_odd in TOKENIZE_CASES:
        yield in_own_process(tokenize_case, count, share_odd)


def tokenize_case(count: int, share_odd: float) -> Row:
    """Tokenise all captions once with both, block by block in turns, with empty memos. Rates are medians over the
    blocks."""
    captions = written_captions(count, share_odd)
    ours, theirs = CaptionTokenizer(), SimpleTokenizer()
    seconds: dict[str, list[float]] = {"ours": [], "theirs": []}
    num_tokens = difference = 0
    for start in range(0, count, _BLOCK):
        block = captions[start : start + _BLOCK]
        began = time.perf_counter()
        expected = theirs(block, CONTEXT_LENGTH)
        between = time.perf_counter()
        tokens = ours(block)
        ended = time.perf_counter()
        seconds["theirs"].append((between - began) / len(block))
        seconds["ours"].append((ended - between) / len(block))
        num_tokens += int(caption_lengths(tokens).sum())
        difference = max(difference, int((tokens - expected).abs().max()))
    a, b = statistics.median(seconds["ours"]), statistics.median(seconds["theirs"])
    return Row(
        case=f"{count} captions of {num_tokens / count:.0f} tokens, {share_odd:.0%} not plain ASCII",
        unit="captions/s",
        ours=1 / a,
        baseline=1 / b,
        ratio=b / a,
        max_abs_diff=difference,  # difference of ids: anything but 0 means another caption
        peak_gb=peak_memory_gb(),
    )


def written_captions(count: int, share_odd: float) -> list[str]:
    """Write sentences of CLIP's own words, with earlier words of its vocabulary more often, and pieces that are no
    words."""
    draw = random.Random(0)
    merges = list(SimpleTokenizer().encoder)[512:]
    words = [token[:-4] for token in merges if token.endswith("</w>") and token[:-4].isalpha() and token.isascii()]
    words = words[:_NUM_WORDS]
    summed = list(accumulate(1 / (rank + 3) for rank in range(len(words))))  # Zipf's law
    captions = []
    for _ in range(count):
        pieces = draw.choices(words, cum_weights=summed, k=_WORDS_A_CAPTION)
        for at in draw.sample(range(_WORDS_A_CAPTION), 14):
            pieces[at] += draw.choice(_ATTACHED)
        if draw.random() < share_odd:
            for at in draw.sample(range(_WORDS_A_CAPTION), draw.randint(1, 4)):
                pieces[at] = draw.choice(_ODD_PIECES)
            if draw.random() < 0.01:
                pieces[0] = draw.choice(_BROKEN_PIECES)
        captions.append(" ".join(pieces).capitalize())
    return captions


def _autocast(options: BenchOptions) -> AbstractContextManager:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(options.precision)
    return torch.autocast(options.device.type, dtype, enabled=dtype is not None)


def _call(function: Callable[[Tensor, int], Tensor], tokens: Tensor, batch: int) -> Callable[[], Tensor]:
    return lambda: function(tokens, batch)
