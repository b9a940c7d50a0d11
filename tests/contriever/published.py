"""Command lines as published, by script."""

COMMANDS = {
    "train": [
        "--retriever_model_id bert-base-uncased --pooling average --augmentation delete --prob_augmentation 0.1 "
        "--train_data encoded-data/bert-base-uncased/wiki encoded-data/bert-base-uncased/cc-net --loading_mode split "
        "--ratio_min 0.05 --ratio_max 0.5 --chunk_length 256 --momentum 0.9995 --queue_size 131072 --temperature 0.05 "
        "--warmup_steps 20000 --total_steps 500000 --lr 0.00005 --scheduler linear --optim adamw --per_gpu_batch_size "
        "64 --output_dir /checkpoint/contriever --projection_size 768 --main_port 10002",
        "--retriever_model_id bert-base-uncased --moco_queue 131072 --momentum 0.9995 --temperature 0.05 "
        "--augmentation delete --prob_augmentation 0.1 --train_data wiki --warmup_steps 20000 --total_steps 500000",
        "--retriever_model_id bert-base-multilingual-cased --pooling average --train_data af ar az be bg "
        "--loading_mode split --ratio_min 0.1 --ratio_max 0.5 --chunk_length 256 --momentum 0.999 --queue_size 32768 "
        "--temperature 0.05 --warmup_steps 20000 --total_steps 500000 --lr 0.00005 --sampling_coefficient 0.0",
    ],
    "generate_passage_embeddings": [
        "--model_name_or_path facebook/contriever --output_dir contriever_embeddings --passages psgs_w100.tsv "
        "--shard_id 0 --num_shards 1"
    ],
    "passage_retrieval": [
        "--model_name_or_path facebook/contriever --passages psgs_w100.tsv --passages_embeddings "
        "contriever_embeddings/* --data nq_dir/test.json --output_dir contriever_nq"
    ],
    "eval_beir": [
        "--model_name_or_path facebook/contriever-msmarco --dataset scifact --beir_dir /data --lower_case --local_rank "
        "-1 --main_port -1 --score_function dot"
    ],
}
