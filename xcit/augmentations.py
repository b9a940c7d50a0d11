"""The images as XCiT sees them (section 4.1, following DeiT)."""

MEAN = (0.485, 0.456, 0.406)  # ImageNet
STD = (0.229, 0.224, 0.225)
CROP_RATIO = 0.875  # of the centre crop and the resized short side; 1 for the published numbers (--full_crop)
