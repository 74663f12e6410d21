"""The networks of Stable Diffusion in functional Linen, with diffusers' names, NHWC.

unet.py UNet2DCondition, vae.py AutoencoderKL, clip.py CLIPTextModel, layers.py what they share and how features are
captured.
"""
