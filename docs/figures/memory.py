"""Memory of each of 8 cards that train LLaMA 7B, 13B or 70B, by the arithmetic of --dry_run."""

from typing import Any

from docs.figures.drawing import BLUE, GREEN, ORANGE, PURPLE, Picture
from minillama.hf_config import published
from minillama.train_config import TrainConfig
from minillama.training.dry_run import Need, needs_of

CARDS = 8
CARD = 80.0  # GB
MODELS = ("7b", "13b", "70b")
LORA: dict[str, Any] = {"lora": True, "lora_rank": 16, "lora_targets": ("all",)}
DIVISIONS: dict[str, dict[str, Any]] = {
    "ZeRO-0": {},
    "ZeRO-1": {"zero_stage": 1},
    "ZeRO-2": {"zero_stage": 2},
    "TP 8": {"tensor_parallel": 8},
    "LoRA, rank 16": LORA,
    "LoRA, TP 8": LORA | {"tensor_parallel": 8},
}
TOKENS = 2048  # of a micro-batch
LEFT = 140
SCALE = 2.8  # points a GB
LONGEST = 160.0  # GB; a longer bar is cut there
BAR = 13
STEP = 18


def need_of(model: str, keys: dict[str, Any]) -> Need:
    """What a card needs: bf16, activations recomputed, one row in a micro-batch."""
    config = TrainConfig(
        init="scratch",
        model=model,
        precision="bf16",
        gradient_checkpointing=True,
        per_device_train_batch_size=1,
        max_length=TOKENS,
        **keys,
    )
    return needs_of(published(model), config, world_size=CARDS)[0]


def parts_of(need: Need) -> list[tuple[str, float, str]]:
    """Name, GB and colour of what a card holds."""
    state = need.state
    return [
        ("weights", state.weights / 1e9, BLUE),
        ("gradients", state.gradients / 1e9, ORANGE),
        ("AdamW: master, m, v", state.optimizer / 1e9, GREEN),
        ("activations", need.activations / 1e9, PURPLE),
    ]


def draw() -> Picture:
    picture = Picture(660, 450)
    top = 34.0
    for model in MODELS:
        picture.title(14, top + BAR / 2, model.upper(), size=12, align="left")
        for division, keys in DIVISIONS.items():
            picture.write(LEFT - 8, top + BAR / 2, division, size=9, align="right")
            draw_bar(picture, top, need_of(model, keys))
            top += STEP
        top += 14
    x = LEFT + CARD * SCALE
    picture.line((x, 24), (x, top - 16))
    picture.write(x, 14, f"a card of {CARD:g} GB")
    draw_legend(picture, top + 8)
    return picture


def draw_bar(picture: Picture, top: float, need: Need) -> None:
    end = 0.0  # GB
    for _, size, color in parts_of(need):
        shown = min(size, LONGEST - end)
        if shown > 0.2:  # thinner than a line
            picture.box(LEFT + end * SCALE, top, shown * SCALE, BAR, color)
        end += shown
    total = f"{need.total / 1e9:,.1f} GB"
    if end >= LONGEST:
        total = f"… {total}"
    is_crossed = CARD - 15 < end < CARD  # a text here would be crossed by the line of the card
    text_at = CARD if is_crossed else end
    picture.write(LEFT + text_at * SCALE + 6, top + BAR / 2, total, size=9, align="left")


def draw_legend(picture: Picture, top: float) -> None:
    x = float(LEFT)
    for name, _, color in parts_of(need_of(MODELS[0], {})):
        picture.box(x, top, BAR, BAR, color)
        picture.write(x + BAR + 6, top + BAR / 2, name, size=9, align="left")
        x += 50 + 6.2 * len(name)
    note = f"{CARDS} cards, bf16, {TOKENS:,} tokens a micro-batch, activations recomputed"
    picture.write(LEFT, top + 28, note, size=9, align="left")
