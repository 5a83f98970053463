"""The names of other tools' settings that mean nothing here: why each is not used, or what to write
instead.

Taken from the dataclasses of transformers 5.24, TRL 1.16, LLaMA-Factory 0.9.5, ms-swift 4.6,
PaddleFormers 1.2 and ERNIEKit 1.3 and from files that their users share. A name is noted where
leaving it out changes no result or is decided elsewhere; it is refused where leaving it out would
change the result, unless its value asks for nothing.
Refuses to know: our own settings and their other spellings (aliases.py), files.
"""

from __future__ import annotations

from ernie_tune.config.language import Text, say

# Values that ask for nothing, whatever the name.
_NOTHING = ("", "none", "null", "auto", "[]", "{}")
# … and of names whose row does not say which values do
_NO = ("false", "no", "off", "0", "0.0", "-1", "default")

# (why, in English and Chinese; names)
_NOTED: tuple[tuple[str, str, str], ...] = (
    (
        "the machine and the model decide which kernels run",
        "由机器与模型决定使用的算子",
        """fuse_linear fuse_rms_norm fuse_rope fuse_softmax_mask fuse_gate_detach_matmul use_flash_attention use_flash_attn flash_attn flash_attention
        flash_mask fa_version attn_impl attn_implementation experts_impl use_mem_eff_attn use_attn_mask_startend_row_indices use_sparse_flash_attn
        use_global_causal_attn use_sparse_head_and_loss_fn use_recompute_loss_fn loss_subbatch_seqlen use_fast_layer_norm use_unsloth enable_liger_kernel
        use_liger_kernel use_liger liger_kernel_config use_v1_kernels kernel_config torch_compile torch_compile_backend torch_compile_mode torchdynamo tf32
        use_cache use_kv_cache use_logits_to_keep to_static use_intermediate_api using_sonic_moe enable_linear_fused_grad_add
        mp_fused_linear_param_grad_add replace_with_c_embedding replace_with_parallel_cross_entropy use_rms_qkv_recompute cache_implementation
        use_quant_before_a2a use_async_a2a use_combine_before_a2a use_ep_comm_overlap use_fp8_fuse_node transpose_split_quant jit_mode_eval use_ipex
        use_transformers_continuous_batching transformers_continuous_batching_config use_transformers_paged enable_npu_model_patch xformers_attention
        flash_attn_cross_entropy flash_attn_rms_norm s2_attention sdp_attention bettertransformer enable_mtp_magic_send moe_multimodal_dispatch_use_allgather""",
    ),
    (
        "the model folder's config.json says it",
        "由模型文件夹的 config.json 决定",
        """use_moe moe_num_experts moe_k moe_gate moe_group_experts moe_use_aux_free moe_use_hard_gate rope_3d num_hidden_layers hidden_size vision_config
        ernie_model_config bos_token_id eos_token_id pad_token_id max_position_embeddings hidden_act depth embed_dim in_channels mlp_ratio num_heads
        patch_size spatial_merge_size attn_sep model_type model_class task_type task_name num_nextn_predict_layers num_empty_layers_add_in_tail
        mtp_num_layers mtp_attention_flexible mtp_distillation_loss multi_token_pred_lambda use_cls head_dim tokenizer_name tokenizer_name_or_path
        tokenizer_type use_fast_tokenizer processor_use_fast is_llama_derived_model is_mistral_derived_model convert_from_hf load_from_hf
        use_huggingface_model config_name init_config multimodal model_name model_author num_labels problem_type max_model_len new_special_tokens_config
        init_special_tokens split_special_tokens init_strategy dsa_indexer_loss_coeff vit_num_recompute_layers vit_second_fwd_batch_size""",
    ),
    (
        "sharding is done by Paddle Fleet; see sharding and sharding_parallel_size",
        "分片由 Paddle Fleet 完成；见 sharding 与 sharding_parallel_size",
        """deepspeed fsdp fsdp_config fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap accelerator_config accelerate_config parallelism_config
        ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout zero_hpz_partition_size
        deepspeed_autotp_size dist_config device_map max_memory local_rank master_addr master_port sharded_ddp mp_parameters use_mca use_hyper_parallel
        hyper_parallel_args ds3_gather_for_generation move_model_batches xpu_backend tpu_num_cores tpu_metrics_debug""",
    ),
    (
        "Fleet plans communication as the layout asks",
        "由 Fleet 按并行布局安排通信",
        """tensor_parallel_config pipeline_parallel_config sharding_parallel_config data_parallel_config sequence_parallel_config disable_pipeline_warmup
        use_sp_callback pp_need_data pp_need_data_degree sharding_comm_buffer_size_MB sharding_comm_group_call_opt sharding_offload_opt_buffersize_GB
        sharding_parallel_mesh_dimension split_inputs_sequence_dim cp_balance_mode cp_comm_type hybrid_parallel_topo_order hybrid_parallel_expert_grad_scale
        dp_comm_overlap pp_sharding_comm_overlap tp_async_allreduce sp_async_reduce_scatter overlap_p2p_comm batch_p2p_comm variable_seq_lengths
        dp_allreduce_avg_in_gradinent_scale sp_allreduce_avg_in_gradinent_scale gradient_sync_after_accumulate mp_async_allreduce mp_skip_c_identity
        fuse_sequence_parallel_allreduce pp_delay_scale_loss pp_sync_param tp_sync_param sync_grad tp_sync_moment pp_sync_moment p2p_cache_shape
        partial_send_recv pp_release_grads clear_every_step_cache non_batch_p2p_comm auto_parallel_sync_shared_params best_unbalanced_scheduler offload_queue
        use_dualpipev forward_backward_overlap_scheduler send_recv_overlap split_backward stage1_tensor_fusion tensor_fusion stage1_overlap overlap
        stage2_overlap stage1_broadcast_overlap stage1_allgather_overlap stage1_reduce_avg fuse_optimizer_states sd_release_grads split_param
        sd_sharding_comm_overlap sd_shardingv1_comm_overlap split_norm_comm nccl_comm_group_config reorder_pipeline_priority release_grads
        enable_auto_parallel auto_parallel_resume_form_hybrid_parallel force_reshard_pp flatten_param_grads tensor_parallel_output moe_with_send_router_loss
        enable_fp8_quantize_analysis server_tp_degree num_of_gpus enable_flattened_weight_sync""",
    ),
    (
        "experts are spread by expert_model_parallel_size; for moe_group mp set it to tensor_model_parallel_size",
        "专家由 expert_model_parallel_size 分布；moe_group 为 mp 时设为 tensor_model_parallel_size",
        "moe_group use_expert_parallel",
    ),
    (
        "memory is allocated as it is needed",
        "显存按需分配",
        """pre_alloc_memory offload_optim offload_optimizer offload_model offload_folder tensorwise_offload_optimizer optim_shard_num torch_empty_cache_steps
        gc_interval gc_steps low_cpu_mem_usage load_via_cpu activation_offloading offload_fp8_expert_master_weight sleep_level offload_teacher_model
        save_hf_memory_growth_threshold""",
    ),
    (
        "recompute decides, for whole layers",
        "由 recompute 决定，以整层为单位",
        """gradient_checkpointing_kwargs activation_checkpointing_kwargs use_reentrant_gc use_unsloth_gc recompute_use_reentrant use_recompute_moe
        use_recompute_mtp recompute_mtp_granularity recompute_mtp_method recompute_mtp_modules vit_gradient_checkpointing
        vit_gradient_checkpointing_kwargs""",
    ),
    (
        "sums, routers and optimizer states are float32, and bfloat16 needs no loss scaling",
        "求和、路由与优化器状态为 float32，bfloat16 无需损失缩放",
        """amp_master_grad amp_custom_black_list amp_custom_white_list scale_loss bf16_full_eval fp16_full_eval fp16_backend half_precision_backend
        upcast_layernorm upcast_lmhead_output cast_lm_head_to_fp32 infer_dtype image_dtype lora_dtype use_lowprecision_moment muon_version""",
    ),
    (
        "the training process prepares its rows itself, when they are needed",
        "训练进程在需要时自行准备数据",
        """prefetch_factor dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor dataloader_multiprocessing_context
        dataloader_in_order dataloader_drop_last preprocessing_num_workers preprocessing_batch_size dataset_num_proc dataset_batch_size buffer_size
        shuffle_buffer_size lazy_tokenize lazy lazy_data_processing lazy_preprocess load_from_cache_file overwrite_cache data_shared_file_system share_folder
        streaming make_offline_data dataset_streaming distributed_dataloader data_cache data_impl dataset_type packing_num_proc packing_interval packed_idx_cache_dir
        binpacking truncate_packing warmup_only_rank0 skip_warmup batching_workers batching_strategy use_train_part_sharding text_use_train_part_sharding
        dataset_kwargs download_mode remove_unused_columns label_names ignore_pad_token_for_loss disable_auto_column_mapping dispatch_batches split_batches
        even_batches dataset_prepared_path dataset_processes in_tokens_batching balanced_image_preprocess estimation_output_file max_estimate_samples
        skip_prepare_dataset tokenize_in_bg map_num_proc""",
    ),
    (
        "rows are never padded",
        "数据不做填充",
        "padding_free pad_to_max_seqlen pad_to_multiple_of pad_to_max_length pad_to_sequence_len padding_side pad_token padding use_padding_free padding_value",
    ),
    (
        "rows come in an order shuffled by seed, and an epoch is all of them",
        "数据按 seed 打乱，一个 epoch 为全部数据",
        """group_by_length train_sampling_strategy length_column_name sortish_sampler num_samples_each_epoch same_data num_consecutive shuffle_consecutive
        modality_interleave modality_ratio trigger_data_prob example_from_same_task_prob pseudo_sampling_prob sampling_wo_replacement_data_resuming
        eval_dataset_prob text_dataset_prob val_dataset_shuffle skip_data_intervals packing_strategy""",
    ),
    (
        "the row and the template decide",
        "由数据行与模板决定",
        """use_pic_id sft_replace_ids serialize_output add_sys_token drop_history_with_k one_sample_in_one_seq variable_resolution render_timestamp
        encode_one_turn split_multi_turn use_template use_chat_template tool_format agent_template enable_thinking preserve_thinking
        add_non_thinking_prefix disable_ignore_empty_think norm_bbox min_shot max_shot factor num_comparisons mask_out_eos_token is_multimodal
        dataset_text_field ignore_eos_token visual_inputs chat_template_kwargs sft_image_normalize sft_image_rescale video_min_pixels
        use_audio_in_video audio_sampling_rate eos_token data_seed_offset is_chatml ernie_template roles_to_train""",
    ),
    (
        "trainer_log.jsonl and metrics.csv always hold everything; report_to names further writers",
        "trainer_log.jsonl 与 metrics.csv 始终记录全部；report_to 指定其他写入方式",
        """logging_strategy logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen include_tokens_per_second
        include_effective_tokens_per_second log_level log_level_replica run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
        skip_memory_metrics debug profile profile_step_start profile_step_end profile_modules skip_profile_timer timer enable_torch_profiler
        count_trained_tokens metrics_output_path output_signal_dir record_optimizer_stat enable_global_training_logs log_global_grad_norm
        global_logging_interval internal_medicine_monitors internal_medicine_monitor_interval moe_logging autotuner_benchmark sft_benchmark
        dpo_benchmark print_param_status ray_scope wandb_project wandb_entity wandb_watch wandb_name wandb_log_model enable_channel_loss log_entropy
        log_multimodal log_unique_prompts wandb_log_unique_prompts log_completions_hub_repo
        log_rollout_offpolicy_metrics logging_token_usage use_wandb""",
    ),
    (
        "answers are greedy when measured; see eval_max_samples, eval_max_new_tokens and eval_metrics",
        "评估时贪心解码；见 eval_max_samples、eval_max_new_tokens 与 eval_metrics",
        """eval_delay prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object eval_accumulation_steps batch_eval_metrics
        include_for_metrics include_inputs_for_metrics predict_with_generate generation_max_length generation_num_beams eval_num_beams generation_config
        compute_accuracy eval_iters minimum_eval_times max_evaluate_steps eval_on_each_dataset eval_with_do_generation eval_metric eval_use_evalscope
        eval_dataset_args eval_limit eval_generation_config extra_eval_args eval_packing acc_strategy save_generation_output do_sample num_beams
        length_penalty skip_special_tokens min_tokens frequency_penalty presence_penalty stream stream_options stop_words logprobs top_logprobs
        structured_outputs_regex infer_backend max_eval_samples use_legacy_prediction_loop generation_kwargs
        eval_sample_packing eval_table_size max_predict_samples""",
    ),
    (
        "checkpoints are always safetensors that can be read at any degree of parallelism",
        "检查点始终为 safetensors，可在任意并行度下读取",
        """save_on_each_node save_safetensors safe_serialization max_shard_size enable_jit_checkpoint unified_checkpoint unified_checkpoint_config
        save_checkpoint_format load_checkpoint_format save_sharded_model load_sharded_model load_sharded_model_remap_parameter_name sharded_model_from_ema
        save_sharding_stage1_model_include_freeze_params save_tokenizer save_rng_states save_to_hf save_hf_steps save_hf_total_limit save_last_step
        save_ckpt_as_hf save_epochs ordered_save_group_size ckpt_quant_stage disable_ckpt_quant ignore_save_lr_and_optim reshard_save_then_exit
        enable_zero_cost_checkpoint zcc_workers_num zcc_pipeline_hooks_capacity_usage zcc_ema_interval zcc_ema_loss_threshold online_merge_ema
        flex_ckpt_comm_method past_index aoa_config replicate_saved_into_local pdc_download_ckpt pdc_download_timeout flash_device_save_steps use_flash_ckpt
        restore_callback_states_from_checkpoint create_checkpoint_symlink add_version copy_custom_file_list merge_with_qdq_base_model merge_weights
        dataset_output_dir optim_shard_merge save_merged_weights hub_revision""",
    ),
    (
        "no token is read from a file; push_to_hub names the repository, and the hub's own variable holds the token",
        "不从文件读取令牌；仓库由 push_to_hub 写明，令牌取自该模型库的环境变量",
        """hub_token hub_private_repo hub_model_id hub_strategy hub_always_push push_to_hub_model_id push_to_hub_organization push_to_hub_token
        hf_hub_token ms_hub_token om_hub_token cache_dir save_to_aistudio aistudio_repo_id aistudio_repo_private aistudio_repo_license aistudio_token
        wandb_api_key wandb_http_proxy export_hub_model_id token use_auth_token hub_model_revision""",
    ),
    (
        "the verb decides",
        "由命令决定",
        """do_train do_predict do_export train_mode infer_mode sft_train""",
    ),
    (
        "`ernie-tune export` has settings of its own",
        "ernie-tune export 有自己的设置",
        """export_dir export_size export_device export_quantization_bit export_quantization_dataset export_quantization_nsamples
        export_quantization_maxlen export_legacy_format""",
    ),
    (
        "no code is taken from model folders",
        "不执行模型文件夹中的代码",
        "trust_remote_code",
    ),
    (
        "answers alone are trained; loss: true or false on a turn of a row says otherwise",
        "只训练回答；可在数据的某轮用 loss: true 或 false 改变",
        "completion_only_loss assistant_only_loss",
    ),
    (
        "router_aux_loss_coef, router_z_loss_coef and moe_orthogonal_loss_lambda decide",
        "由 router_aux_loss_coef、router_z_loss_coef 与 moe_orthogonal_loss_lambda 决定",
        "use_ortho_loss_callback output_router_logits",
    ),
    (
        "the device is the one that is here",
        "使用本机的设备",
        "ignore_bias_buffers use_cpu no_cuda use_mps_device device n_gpu place",
    ),
    (
        "the same seed gives the same losses in any case",
        "相同 seed 总得到相同损失",
        "full_determinism deterministic_mode",
    ),
    (
        "the loss is averaged over all tokens of a step, on all devices",
        "损失对一步内所有设备的全部 token 求平均",
        "average_tokens_across_devices",
    ),
    (
        "mistakes are always said",
        "错误总会指出",
        "ignore_args_error strict check_model load_args load_data_args",
    ),
    (
        "the schedule ends at min_lr",
        "学习率曲线终点为 min_lr",
        "decay_function decay_steps lr_end num_cycles power lr_decay_steps lr_decay_style cosine_min_lr_ratio",
    ),
    (
        "vit_lr_ratio sets the vision rate; it does not decay over layers",
        "视觉学习率由 vit_lr_ratio 决定，不按层衰减",
        "visual_ld",
    ),
    (
        "quantization_bit or weight_quantize_algo decides",
        "由 quantization_bit 或 weight_quantize_algo 决定",
        """quant_method quantization_method quantization_type double_quantization quantization_device_map bnb_4bit_quant_type bnb_4bit_compute_dtype
        bnb_4bit_use_double_quant bnb_4bit_quant_storage use_bnb_nested_quant hqq_axis quant_config qlora_weight_blocksize qlora_weight_double_quant
        qlora_weight_double_quant_block_size quant_input_grad quant_weight_grad apply_online_actscale_step actscale_moving_rate fp8_format_type
        fp8_backend fp8_enable_fsdp_float8_all_gather fp8_mem_configs fp8_fused_ops_configs fp8_force_clear_state hadamard_block_size""",
    ),
    (
        "comparisons are made without dropout, and the reference is asked in the batches of training",
        "比较时不用 dropout，参考以训练批大小计算",
        "disable_dropout precompute_ref_batch_size dataset_num_workers precompute_ref_eval_batch_size model_with_dpo_criterion num_of_ref",
    ),
    (
        "ref_model_update_steps decides (TRL's own default is 512)",
        "由 ref_model_update_steps 决定（TRL 默认 512）",
        "sync_ref_model",
    ),
    (
        "it belongs to stages that sample answers, or to a method that is not named here",
        "属于采样回答的阶段，或未启用的方法",
        """shuffle_dataset vespo_k_pos
        vespo_lambda_pos vespo_k_neg vespo_lambda_neg                 max_tool_calling_iterations normalize_advantages use_vllm ppo_buffer_size
        ppo_score_norm ppo_target ppo_whiten_rewards reward_model_adapters reward_model_quantization_bit reward_model_type
        reward_adapters reward_model_revision reward_template
        local_rollout_forward_batch_size num_sample_generations response_length lmbda seq_kd gkd_logits_topk
        multi_turn_scheduler completion_length_limit_scope use_gym_env gym_env
        soft_max_length advantage_reweight real_tau
        repetition_n_grams repetition_max_penalty loss_scale_type num_nodes discopop_tau adapter_act adapter_length asft_alpha eaft_alpha module_dropout
        pissa_iter pissa_convert loraplus_lr_embedding loraga lora_use_mixer use_quick_lora adapter_folder lorapro_x_mode lorapro_scaling_factor
        lokr_path lokr_dim prefix_path ssa_group_size_ratio rope_scaling_factor strategy_type strategy_name rlsd_lambda dropout_warmup_steps
        use_swift_lora tuner_backend lora_task_type base_model_name_or_path enable_lora_list do_qat""",
    ),
)

# Beginnings of names that belong together, asked for what no table names.
_FAMILIES: tuple[tuple[str, str, str], ...] = (
    (
        "vllm_ sglang_ lmdeploy_ rollout_ ray_ rlsd_ sdar_ fipo_ chord_ cosine_ teacher_ gkd_ critic_ actor_ device_groups use_ray",
        "it belongs to stages that sample answers, which do so in the training process itself",
        "属于采样回答的阶段，由训练进程自行采样",
    ),
    (
        "galore_ apollo_ badam_ oft_ boft_ vera_ fourier_ adalora_ lisa_ llamapro_ reft_ lora_ga_ muon_ kt_ decision_ mrl_ zcc_",
        "it belongs to a method that is not named here",
        "属于未启用的方法",
    ),
    (
        "swanlab_ wandb_ trackio_ mlflow_ comet_ profiler_ clearml_",
        "the writer is configured by its own environment variables",
        "由其自身的环境变量配置",
    ),
    ("fsdp_ ddp_ deepspeed_ accelerate_ megatron_", "sharding is done by Paddle Fleet", "分片由 Paddle Fleet 完成"),
    (
        "push_to_hub_ hub_ aistudio_",
        "push_to_hub and push_hub alone say what is uploaded",
        "上传只由 push_to_hub 与 push_hub 决定",
    ),
    ("dataloader_", "the training process prepares its rows itself", "训练进程自行准备数据"),
    ("use_fp8_ fp8_", "weight_quantize_algo decides", "由 weight_quantize_algo 决定"),
)

# (what to write instead, in English and Chinese; names, each with further values that ask for
# nothing)
_REFUSED: tuple[tuple[str, str, str], ...] = (
    (
        "list the file in train_dataset_path",
        "请把文件写入 train_dataset_path",
        """text_dataset_path offline_dataset_path input_dir data_filelist cached_dataset cached_val_dataset tokenized_path data_files data_dir train_dataset
        datasets dataset_configs custom_dataset_info train_file validation_file""",
    ),
    ("set train_dataset_prob, one weight a file", "请设置 train_dataset_prob，每个文件一个权重", "data_weights"),
    ("name the rows as a file; give one split or part of it a file of its own", "请以文件给出数据，每个划分一个文件",
     "dataset_config dataset_train_split=train dataset_test_split=test split=train subset name path columns fraction dataset_split=train"),
    ("write picture paths beside the data file, or absolute", "图片路径请相对数据文件书写，或用绝对路径", "media_dir image_folder image_dir"),
    ("give each stage its own train_dataset_path", "请为每个阶段单独设置 train_dataset_path", "data_split"),
    ("set kl_coef, the penalty in the reward, and beta: 0", "请设置 kl_coef（奖励中的惩罚）与 beta: 0", "kl_in_reward use_kl_in_reward"),
    ("set beta: 0 for no penalty in the loss", "不要损失中的惩罚请设 beta: 0", "use_kl_loss=true"),
    ("set max_resample_times, one less: it counts what is drawn again", "请设置 max_resample_times（少 1）：它只计重新抽取的次数",
     "dynamic_sampling_max_gen_batches max_num_gen_batches"),
    ("set dynamic_sample: true", "请设置 dynamic_sample: true", "filter_groups"),
    ("set num_mini_batches, optimizer steps a round", "请设置 num_mini_batches（每轮的优化步数）", "global_mini_batch_size ppo_mini_batch_size"),
    ("answers are sampled by the weights that are trained, in step with them: remove it", "回答由正在训练的权重同步采样：请删除",
     "async_steps=0 max_staleness=0 async_generate=false max_head_offpolicyness=0 max_trajectory_age_steps=0 partial_rollout=false"),
    ("set over_sample, prompts that are answered over those that a round lacks", "请设置 over_sample（所答提示数与一轮所缺数之比）",
     "over_sample_rate=0|0.0|1|1.0 over_sampling_batch_size"),
    ("the coefficient moves by .005 a step between 0 and 1: set those, or remove it", "系数每步移动 0.005，范围 0 到 1：请设为这些值或删除",
     "entropy_coef_min=0|0.0 entropy_coef_max=1|1.0 entropy_coef_delta=0.005"),
    ("set reward_clip: low,high", "请设置 reward_clip: 低,高", "clip_range_score"),
    ("answers show what the row asks for, nothing is given away: remove it", "不提供提示性内容：请删除", "hint_decay"),
    ("set sharding: stage2 and more cards; offloading is not in this version", "请设置 sharding: stage2 并增加卡数", "offload"),
    ("rows are always shuffled: remove it", "数据总会打乱：请删除", "disable_shuffling random_shuffle=true dataset_shuffle=true train_dataloader_shuffle=true dataloader_shuffle=true"),
    ("mark turns of the rows with loss: true or false", "请在数据的每轮用 loss: true 或 false 标记",
     "train_on_prompt mask_history train_on_inputs loss_scale=all is_binary_loss_scale"),
    ("write the system turn into the rows", "请把 system 轮写进数据", "default_system system response_prefix system_prompt"),
    ("the model's own template is used: remove it", "使用模型自带模板：请删除", "chat_template chat_template_path=hf"),
    ("the vocabulary stays as it is: remove it", "词表不变：请删除",
     "resize_vocab add_tokens add_special_tokens new_special_tokens new_special_tokens_path special_tokens tokens"),
    ("name a preset as model_name_or_path for fresh weights, e.g. tiny-a or small", "全新权重请用预设名作 model_name_or_path，如 tiny-a 或 small",
     "from_scratch train_from_scratch continue_training=true"),
    ("download that revision and name its folder", "请下载该版本并写出文件夹", "model_revision=main|master revision_of_model=main|master resume_from_huggingface_ckpt local_repo_path"),
    ("the model is a whole, tower and all: remove it", "模型为整体，含视觉塔：请删除", "vision_model_name_or_path"),
    ("set optim: adamw", "请设置 optim: adamw",
     "use_galore use_apollo use_badam use_adam_mini use_muon adafactor optim_args optim_target_modules optim_config use_lomo"),
    ("set min_lr", "请设置 min_lr", "lr_scheduler_kwargs lr_scheduler_config min_lr_rate min_lr_ratio"),
    ("use max_grad_norm", "请用 max_grad_norm", "adaptive_norm_clip"),
    ("set vit_lr_ratio, the vision rate over learning_rate", "请设置 vit_lr_ratio（视觉学习率与 learning_rate 之比）", "vit_lr aligner_lr vision_lr mm_projector_lr embedding_learning_rate"),
    ("all layers have one rate: remove it", "各层学习率相同：请删除", "layerwise_lr_decay_bound=1|1.0"),
    ("nothing but the adapters has dropout: set 0", "仅适配器有 dropout：请设为 0", "hidden_dropout_prob attention_probs_dropout_prob moe_dropout_prob attention_dropout"),
    ("noise on embeddings is not in this version: remove it", "不支持嵌入噪声：请删除", "neftune neftune_noise_alpha noisy_embedding_alpha"),
    ("set loss_norm", "请设置 loss_norm", "token_balance_loss use_dft_loss enable_dft_loss use_asft_loss use_eaft_loss label_smoothing_factor"),
    ("set trainable_layers or frozen_layers, numbers or names", "请设置 trainable_layers 或 frozen_layers（层号或名称）",
     """freeze_trainable_layers freeze_trainable_modules freeze_extra_modules freeze_parameters freeze_parameters_regex freeze_parameters_ratio
     trainable_parameters trainable_parameters_regex trainable_modules trainable_bias train_emb_only train_moe_only freeze_training train_mtp_only
     unfrozen_parameters freeze_embed lora_modules_to_save modules_to_save additional_target num_layers_unfrozen"""),
    ("set lora_experts or lora_expert_list", "请设置 lora_experts 或 lora_expert_list", "target_parameters lora_target_parameters"),
    ("adapters start from random A and zero B, with no bias: remove it", "适配器从随机 A、零 B 开始，无偏置：请删除", "lora_bias init_weights=true init_lora_weights=true peft_config"),
    ("lora_path is continued; merge it first to put a new adapter on it", "lora_path 会被继续训练；如需新适配器请先合并", "create_new_adapter"),
    ("set fine_tuning to one of LoRA, Full, Freeze, Adapter, Prompt, PTuning, Prefix", "请把 fine_tuning 设为 LoRA、Full、Freeze、Adapter、Prompt、PTuning 或 Prefix",
     "use_llama_pro use_mora vera lokr reft lorapro reft_args shift_attn mixture_of_depths use_kt use_ssa block_diag_attn"),
    ("set weight_quantize_algo: fp8_linear with adapters", "请设置 weight_quantize_algo: fp8_linear 并用适配器", "fp8 use_fp8 use_fp8_mlp"),
    ("set weight_quantize_algo: nf4", "请设置 weight_quantize_algo: nf4", "apply_hadamard"),
    ("positions stay as the model has them: remove it", "位置编码不变：请删除", "rope_scaling use_long_sequence_strategies"),
    ("pictures are resized whole: set image_max_pixels", "图片整体缩放：请设置 image_max_pixels", "image_do_pan_and_scan crop_to_patches"),
    ("use tensor_model_parallel_size with sequence_parallel", "请用 tensor_model_parallel_size 与 sequence_parallel", "sequence_parallel_size=1 ulysses_parallel_size=1 ring_parallel_size=1 cp_size=1"),
    ("set packing and max_seq_len", "请设置 packing 与 max_seq_len", "packing_length autoregressive use_pose_convert"),
    ("the reference is the policy as it starts; see ref_mode", "参考为起始策略；见 ref_mode", "ref_model ref_model_adapters ref_adapters ref_adapter_name ref_model_quantization_bit ref_model_type ref_model_revision reference_model"),
    ("set loss_type: sigmoid,bco_pair with loss_weights", "请设置 loss_type: sigmoid,bco_pair 与 loss_weights", "pref_bco_weight"),
    ("take loss_type sigmoid_norm", "请用 loss_type sigmoid_norm", "normalize_logps"),
    ("code of others is not loaded: remove it", "不加载外部代码：请删除", "external_plugins custom_register_path callbacks plugins custom_dataset_path model_kwargs model_init_kwargs"),
    ("give per_device_train_batch_size and gradient_accumulation_steps", "请给出 per_device_train_batch_size 与 gradient_accumulation_steps", "global_batch_size train_batch_size"),
    ("resume_only_model takes the weights alone", "resume_only_model 只取权重", "ignore_load_lr_and_optim"),
    ("averaged weights are not in this version: remove it", "不支持权重平均：请删除", "zcc_save_ema_coef ema_decay use_ema"),
)  # fmt: skip


def _spread(rows: tuple[tuple[str, str, str], ...]) -> dict[str, tuple[Text, tuple[str, ...]]]:
    """name -> (text, further values that ask for nothing). A name stands in one row only."""
    table: dict[str, tuple[Text, tuple[str, ...]]] = {}
    for english, chinese, names in rows:
        text = say(english, chinese)
        for word in names.split():
            name, _, values = word.partition("=")
            assert name not in table, name
            table[name] = (text, tuple(values.split("|")) if values else ())
    return table


IGNORED: dict[str, Text] = {name: text for name, (text, _) in _spread(_NOTED).items()}
REFUSED: dict[str, tuple[Text, tuple[str, ...]]] = _spread(_REFUSED)


def reason(name: str) -> Text | None:
    """Why a setting of another tool is not used here; None for a name that is not known, or that is
    refused where it asks for something.
    """
    if name in IGNORED:
        return IGNORED[name]
    for beginnings, english, chinese in _FAMILIES:
        if name not in REFUSED and name.startswith(tuple(beginnings.split())):
            return say(english, chinese)
    return None


def asks_for_nothing(name: str, value: str) -> bool:
    """Whether this value of a refused name changes nothing."""
    return " ".join(value.lower().split()) in (*_NOTHING, *(REFUSED[name][1] or _NO))
