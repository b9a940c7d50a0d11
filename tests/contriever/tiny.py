"""The smallest runs of Contriever."""

from tests.tiny_training import Training

FLAGS = (
    "--per_gpu_batch_size 4 --queue_size 8 --total_steps 12 --warmup_steps 2 --lr 0.01 --temperature 0.5 "
    "--chunk_length 32 --augmentation delete --prob_augmentation 0.1 --momentum 0.9 --num_workers 0 --device cpu "
    "--amp fp32 --log_freq 1 --eval_freq 4 --eval_documents 8 --saveckp_steps 1 --save_freq 4"
)
TRAININGS = {
    "contriever": Training(
        "contriever.train",
        tuple(FLAGS.split()),
        data=("--train_data", "{tokens}", "--retriever_model_id", "{encoder}"),
        pair=("--per_gpu_batch_size", "2"),
        exact=("--dropout", "0"),
        launcher=("contriever.run_with_submitit", "main"),
        job=("--total_steps", "120", "--save_freq", "0", "--eval_freq", "0"),
    )
}
