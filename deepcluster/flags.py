"""Help texts that the evaluation scripts have in common."""

MODEL_HELP = "checkpoint of main.py or of the official code; alexnet or vgg16: the released weights"
IMAGES_HELP = "a folder, a .txt list or a torchvision data set name; None: the embedded materials"
