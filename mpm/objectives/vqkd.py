"""Training of BEiT v2's tokenizer: quantised patch tokens that tell a teacher's features."""

from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from mpm.backbones.attention import Attention
from mpm.backbones.backbone import Backbone, Positions
from mpm.backbones.blocks import Block, Mlp
from mpm.objectives.masked import ObjectiveOutput
from mpm.objectives.tokenizer_inputs import TokenizerInputs
from mpm.patchify.stems import LinearStem
from mpm.tokenizers.codebook import code_metrics
from mpm.tokenizers.vqkd import VQKD, task_layer

__all__ = ["VQKDTraining"]


class VQKDTraining(nn.Module):
    """Vector-quantised knowledge distillation (BEiT v2, arXiv:2208.06366, section 3.1).

    loss = mean(1 - cos(told, teacher's)) + commitment * mean((z - v)^2), where z are the tokenizer's unit
    vectors and v those of their codes, which get no gradient and follow z instead (`Codebook`).

    The decoder is the released code's: a transformer of the encoder's width on the grid of codes, with a
    class token and positions of its own and biases of queries and values only, a norm, Linear-Tanh-Linear.

    Unlike the released code, the codebook starts from the vectors of all processes and is the same on all,
    evaluation changes nothing, and codes that nothing chooses are moved.

    Args:
        tokenizer: what is trained; its codebook is started on the first batch in train mode.
        feature_dim: width F of the teacher's features.
        decoder_depth: blocks of the decoder; published: 1 and 3.
        num_heads: of each of them.
        commitment: weight of the distance between vectors and their codes.
        decay: share of a code's vector that is kept at each step.
        seed: of what is drawn for the codebook, with the step.
    """

    def __init__(
        self,
        tokenizer: VQKD,
        *,
        feature_dim: int,
        decoder_depth: int,
        num_heads: int,
        commitment: float = 1.0,
        decay: float = 0.99,
        seed: int,
    ):
        super().__init__()
        grid, dim = tokenizer.backbone.grid, tokenizer.backbone.dim
        self.tokenizer = tokenizer
        self.decoder = Backbone(
            LinearStem((1, 1), dim, channels=tokenizer.codebook.dim),
            [
                Block(Attention(dim, num_heads, qkv_bias="query_value"), Mlp(dim, 4 * dim))
                for _ in range(decoder_depth)
            ],
            grid=grid,
            positions=Positions(grid, dim, learned=True),
        )
        self.decoder_norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = task_layer(dim, feature_dim)
        self._commitment = commitment
        self._decay = decay
        self._seed = seed

    def tell(self, vectors: Tensor) -> Tensor:
        """Codes' vectors [B,N,d] -> features [B,N,F]."""
        image = rearrange(vectors, "b (h w) d -> b d h w", h=self.decoder.grid[0])
        told: Tensor = self.head(self.decoder_norm(self.decoder(image).patches))
        return told

    def forward(self, inputs: TokenizerInputs, progress: Tensor) -> ObjectiveOutput:
        """Losses are float32 in autocast too; `progress` is not used."""
        assert inputs.features is not None, "VQ-KD needs a teacher"
        codebook = self.tokenizer.codebook
        z = self.tokenizer.project(inputs.images)  # [B,N,d]
        if self.training and not codebook.is_started:
            codebook.start(z, seed=self._seed)
        vectors, codes = codebook.quantize(z)
        if self.training:
            codebook.accumulate(z, codes)
        told = self.tell(vectors).float()
        distance = 1 - F.cosine_similarity(told, inputs.features, dim=-1).mean()
        commitment = F.mse_loss(z, vectors.detach())
        metrics = {
            "distance": distance.detach(),
            "commitment": commitment.detach(),
            **code_metrics(codes, codebook.num_codes),
        }
        return ObjectiveOutput(distance + self._commitment * commitment, metrics)

    def after_step(self, step: int) -> None:
        """The codebook follows what was assigned to it."""
        self.tokenizer.codebook.move(self._decay, step=step, seed=self._seed)
