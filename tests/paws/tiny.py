"""The smallest runs of PAWS."""

from tests.tiny_training import Training

FLAGS = (
    "--dataset digits --image_size 12 --small_image_size 8 --multicrop 1 --model_name wide_resnet10w1 --output_dim 16 "
    "--use_pred_head true --unsupervised_batch_size 4 --supervised_imgs_per_class 2 --labels_per_class 4 --lr 0.5 "
    "--start_lr 0.1 --final_lr 0.01 --warmup 0 --epochs 2 --device cpu --num_workers 0 --log_freq 2 "
    "--eval_knn_freq 0 --pictures off --checkpoint_freq 1 --saveckp_steps 1"
)
PAIR = ("--unsupervised_batch_size", "2")
PAWS = Training(
    "paws.paws_train",
    tuple(FLAGS.split()),
    pair=PAIR,
    rounding=0.01,
    launcher=("paws.main_distributed", "main"),
    job=("--epochs", "20", "--checkpoint_freq", "0"),
)
UNIQUE_CLASSES = (*PAIR, "--unique_classes_per_rank", "true", "--classes_per_batch", "1")
TRAININGS = {"paws": PAWS, "paws_unique_classes": Training("paws.paws_train", PAWS.flags, pair=UNIQUE_CLASSES)}
