"""Which vector stands for a caption? A BERT-shaped encoder from transformers, trained from scratch."""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pretrain.config import Text


class TextEncoder(nn.Module):
    """Caption tokens [n, length] to one vector [n, width]: the last state of the first ([CLS]) token.

    Shape and initialisation are BERT's (arXiv 1810.04805; base: 12 layers, 768 wide, 12 heads), without
    dropout: contrastive captions are seen a few times at most.
    """

    def __init__(self, text: Text, vocab_size: int) -> None:
        from transformers import BertConfig, BertModel  # takes seconds, and runs without text do not need it

        super().__init__()
        self.width = text.width
        self.bert = BertModel(
            BertConfig(
                vocab_size=vocab_size,
                hidden_size=text.width,
                num_hidden_layers=text.layers,
                num_attention_heads=text.heads,
                intermediate_size=text.ffn,
                max_position_embeddings=text.length,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                attn_implementation="sdpa",
            ),
            add_pooling_layer=False,
        )

    def forward(
        self, tokens: Int[Tensor, "n length"], token_mask: Bool[Tensor, "n length"]
    ) -> Float[Tensor, "n width"]:
        """Rows without any real token give a finite vector that means nothing."""
        # A row that attends to nothing would be NaN: let it see its first padding token.
        visible = token_mask.clone()
        visible[:, 0] = True
        # For one mask a row transformers would look whether it hides anything, and so wait for the device.
        by_query = visible[:, None, None, :].expand(-1, 1, tokens.shape[1], -1)
        states = self.bert(input_ids=tokens, attention_mask=by_query).last_hidden_state
        return states[:, 0]
