"""What a configuration of a UNet may ask for."""

import pytest

from flaxkd.models.unet import REMAT, UNet2DCondition, UNetConfig

SD1 = dict(
    sample_size=8,
    block_out_channels=[32, 64, 64, 64],
    layers_per_block=2,
    attention_head_dim=4,
    cross_attention_dim=24,
    down_block_types=["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    up_block_types=["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    norm_num_groups=8,
)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(class_embed_type="timestep"), r"class_embed_type = 'timestep' \(supported: None\)"),
        (
            dict(cross_attention_dim=[32, 32, 64, 64]),
            r"cross_attention_dim = \[32, 32, 64, 64\] \(supported: one",
        ),
        (dict(new_field=3), r"new_field = 3 \(unknown field\)"),
        (dict(down_block_types=["AttnDownBlock2D"] * 4), "down_block_types: 'AttnDownBlock2D'"),
        (dict(attention_head_dim=[1, 2]), "attention_head_dim has 2 entries for 4 blocks"),
        (dict(layers_per_block=[2] * 3), "  layers_per_block has 3 entries for 4 blocks"),
        (
            dict(transformer_layers_per_block=[1] * 5),
            "  transformer_layers_per_block has 5 entries for 4 blocks",
        ),
        (dict(reverse_transformer_layers_per_block=[1]), "  reverse_transformer_layers_per_block has 1 entr"),
        (
            dict(
                transformer_layers_per_block=[1, [1], 1, 1],
                reverse_transformer_layers_per_block=[1, [1] * 2, 1, 1],
            ),
            r"  transformer_layers_per_block\[1\] has 1 entries for 2 layers\n  reverse\w*\[1\] has 2 entries for 3",
        ),
        (dict(transformer_layers_per_block=[[1, 1]] * 4), "needs reverse_transformer_layers_per_block"),
    ],
)
def test_a_config_that_asks_for_more_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        UNetConfig.from_dict(SD1 | change)


def test_remat_is_one_of_few_words():
    assert [UNet2DCondition(UNetConfig(), remat=remat).remat for remat in REMAT] == [*REMAT]
    with pytest.raises(ValueError, match=r"remat = 'layers' is unknown \(known: False, True, 'blocks', 'transformer_"):
        UNet2DCondition(UNetConfig(), remat="layers")
