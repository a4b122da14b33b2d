"""What a TRM is built like and how it is fitted: validated, JSON and YAML friendly.

Two architectures share one contract (score = inner product of a user and an item vector): `paper`
is the paper's to the letter (arXiv 2505.16810), `deeprec` is what our experiments chose.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from ...errors import TRMError


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Shared(_Strict):
    history_length: int = Field(20, ge=1, le=1000)  # items of the history that are read
    layers: int = Field(2, ge=1, le=24)
    heads: int = Field(2, ge=1, le=32)
    # Set by `fit` from what it was given; they tie a checkpoint to its encoder and data set.
    text_dim: int = Field(0, ge=0)
    encoder_fingerprint: str = ""
    dataset_fingerprint: str = ""


class PaperConfig(_Shared):
    """The architecture of the paper."""

    name: Literal["paper"] = "paper"
    dim: int = Field(128, ge=2)  # width of ID embeddings, states and vectors
    inner: int = Field(512, ge=1)  # feed-forward width
    experts: int = Field(8, ge=1)  # linear experts of the text adaptor
    expert_dropout: float = Field(0.2, ge=0, lt=1)
    dropout: float = Field(0.5, ge=0, lt=1)
    temperature: float = Field(0.07, gt=0)  # cosines are divided by it, so that scores are logits


class DeepRecConfig(_Shared):
    """Late fusion: history, transitions and preference each own a block of the vectors."""

    name: Literal["deeprec"] = "deeprec"
    dim: int = Field(64, ge=2)  # history block
    transition_dim: int = Field(64, ge=2)  # item-to-item block
    preference_dim: int = Field(64, ge=2)  # preference block
    inner: int = Field(128, ge=1)  # feed-forward width
    # Weight that counted transitions start with; 0 = the block starts at random.
    transition_start: float = Field(0.4, ge=0)
    dropout: float = Field(0.5, ge=0, lt=1)
    item_dropout: float = Field(0.1, ge=0, lt=1)  # how often an item is met by its text alone
    # By how much the preference block of an item that was not in training is raised.
    cold_preference: float = Field(0.4, ge=0)


NAMES = ("paper", "deeprec")
TRMConfig = Annotated[PaperConfig | DeepRecConfig, Field(discriminator="name")]
_ADAPTER: TypeAdapter[PaperConfig | DeepRecConfig] = TypeAdapter(TRMConfig)


class PreferenceMix(_Strict):
    """Share of training examples by where their preference comes from; the rest describe the
    target in its own attributes. The shares here sum to at most 1.
    """

    history: float = Field(0.25, ge=0, le=1)  # most frequent attributes of the history
    unrelated: float = Field(0.1, ge=0, le=1)  # describes another item
    title: float = Field(0.1, ge=0, le=1)  # a title: the target's or a similar item's

    @model_validator(mode="after")
    def _sum(self) -> "PreferenceMix":
        if self.history + self.unrelated + self.title > 1:
            raise ValueError("history, unrelated and title sum to more than 1")
        return self


class FitConfig(_Strict):
    """How a TRM is fitted."""

    epochs: int = Field(15, ge=1)  # at most; early stopping may end sooner
    patience: int = Field(4, ge=1)  # epochs without a better validation score
    batch_size: int = Field(1024, ge=1)  # targets in a step
    learning_rate: float = Field(2e-3, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup: float = Field(0.1, ge=0, le=0.9)  # share of all steps
    ema: float = Field(0.99, ge=0, lt=1)  # decay of the average of weights, which is what is kept
    preferences: bool = True  # False fits the twin that never sees one
    mix: PreferenceMix = PreferenceMix()
    noise: float = Field(0.02, ge=0)  # added to each number of a preference embedding
    pool: int = Field(12_000, ge=100)  # preference texts to embed before training
    full_softmax_items: int = Field(20_000, ge=0)  # larger catalogs use sampled softmax
    negatives: int = Field(2048, ge=1)  # uniform negatives of sampled softmax, shared in a batch
    valid_users: int = Field(10_000, ge=1)  # users that the validation score is taken over


def parse_config(raw: object) -> PaperConfig | DeepRecConfig:
    """The configuration in a JSON object. Raises TRMError that names what is wrong."""
    try:
        return _ADAPTER.validate_python(raw)
    except ValidationError as error:
        raise TRMError(f"not a TRM configuration: {error}") from error
