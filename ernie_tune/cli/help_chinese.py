"""What `ernie-tune VERB --help` says in Chinese; the English is the docstring of the verb.

Refuses to know what verbs do. A test holds both to the same options.
"""

from __future__ import annotations

HELP = {
    "train": """ernie-tune train FILE [key=value | --key value ...] [--dry-run] [--nproc N]

按 YAML 文件微调；其中的 stage 决定方法。再次执行同一命令即从中断处继续。
--dry-run：检查设置与数据，并对最重的一批做一次前向与反向，然后停止。可见多张卡或并行度要求时，
每张卡启动一个进程；--nproc N：在本机启动 N 个进程，CPU 上也可以。
多台机器：NNODES、RANK、MASTER_ADDR、MASTER_PORT。""",
    "dpo": """ernie-tune dpo FILE [key=value | --key value ...] [--dry-run]

从成对的回答、排序与评分中学习，即 stage=DPO 的 `ernie-tune train`。
loss_type：sigmoid、ipo、simpo、orpo 等。""",
    "kto": """ernie-tune kto FILE [key=value | --key value ...] [--dry-run]

从标为好或坏的单个回答中学习，即 stage=KTO 的 `ernie-tune train`。
loss_type：kto、bco、apo_zero_unpaired。""",
    "upo": """ernie-tune upo FILE [key=value | --key value ...] [--dry-run]

从成对回答、排序、评分与标签中一起学习，即 stage=UPO 的 `ernie-tune train`。
loss_type：upo_hetero、mpo；upo_online、upo_group、upo_offline 与 dpo_aux 对可检验的提示采样回答，
并在策略自身的损失之外加入成对的损失。""",
    "reward": """ernie-tune reward FILE [key=value | --key value ...] [--dry-run]

用成对回答、排序与评分训练奖励模型，即 stage=RM 的 `ernie-tune train`；用 `ernie-tune score` 打分。

ernie-tune reward test FILE [--samples N] [--rows N] [key=value | --key value ...]

在训练之前试验 FILE（stage 为 RLVR 或 PPO）的奖励：正确回答平均须得到可得的 0.95，
策略可能尝试的取巧回答须得不到奖励。有不通过的测试时退出码为 1。""",
    "rlvr": """ernie-tune rlvr FILE [key=value | --key value ...] [--dry-run]

采样回答并评判，从好于预期的回答中学习，即 stage=RLVR 的 `ernie-tune train`。
loss_type：dapo、grpo、gspo 等。""",
    "ppo": """ernie-tune ppo FILE [key=value | --key value ...] [--dry-run]

采样回答，用奖励模型、检验器或两者评判，从好于价值网络预期的回答中学习，
即 stage=PPO 的 `ernie-tune train`。reward_model：`ernie-tune reward` 得到的文件夹。""",
    "score": """ernie-tune score FOLDER ROWS [OUT.jsonl]

用 FOLDER（`ernie-tune reward` 的 output_dir）中的模型，给 ROWS 中每个被评判的回答打分
（任何含成对、排序、评分或标签的格式）。每行输出：id；rewards，顺序同该行的回答（null：过长）；best；
以 rating_loss: ordinal 训练的模型还给出预期评分，范围为 1 到 rating_levels。写入 OUT，或直接打印。""",
    "eval": """ernie-tune eval FOLDER | FILE [key=value | --key value ...]

在评测数据上的损失，以及生成的回答的得分。FOLDER：某次训练的 output_dir，评测其结果。
FILE：YAML 文件，评测其中指定的模型。回答写入 output_dir 的 eval_answers.jsonl。""",
    "predict": """ernie-tune predict MODEL ROWS OUT.jsonl [--option value ...]

用 MODEL（模型文件夹，或某次训练的 output_dir）回答 ROWS 的每一行（训练可读的任何格式；
其中的回答保留为 `reference`，模型看不到）。OUT.jsonl 按顺序每行一条：row、line、id、messages、
images、reference、answers（content、reasoning_content、finish_reason、logp：回答各 token 之和）。
无法提问的行得到 `error`，在结尾列出，并使退出码为 1；0 表示每行都有回答。中断后再次执行同一命令即继续。

--n 1               每行的回答数；多个回答默认以温度 1 采样
--temperature 0     0 为贪心；另有 --top_p 1、--top_k 0、--seed 0
--max_new_tokens 256
--rows 64           同时计算的回答数
--logprobs true     同时给出各回答的 token 与对数概率
--format auto       ROWS 的格式""",
    "chat": """ernie-tune chat FOLDER_OR_YAML [--temperature 0.7] [--top_p 0.9] [--max_new_tokens 256]
[--seed 0]

与模型文件夹或某次训练的结果（其输出文件夹，或其中的 ernie_tune_args.yaml）对话。对话中：
/image PATH 给下一个问题附图，/new 忘记此前的对话，/think on 或 off，/exit 离开。
Ctrl-C 停止当前回答。""",
    "serve": """ernie-tune serve FOLDER_OR_YAML [--port 8180] [--host 127.0.0.1] [--adapters
NAME=FOLDER,NAME=FOLDER] [--api_key KEY,KEY] …

以 OpenAI 接口（/v1/chat/completions、/v1/completions、/v1/embeddings、/v1/models；/health、/metrics）
提供模型服务：模型文件夹、已完成的训练，或导出的 int8、int4 文件夹；/ 是对话网页。
向量为最后隐藏状态的均值，长度为 1；其 input 的一项也可为消息的各部分，含图片。
需要：pip install fastapi uvicorn pydantic llguidance。

名称      --served_model_name NAME 请求中的模型名（默认：其文件夹名）；适配器用 --adapters 中的名称
密钥      --api_key KEY,KEY，或变量 ERNIE_TUNE_API_KEY；都没有则任何人可用
主机      --allow_hosts NAME,NAME 客户端可用的主机名，除 localhost 之外
          （--host 不限于本机时，还有其地址与本机名）
限制      --max_model_len、--default_max_tokens 1024、--max_num_seqs 64（同时的回答数）、
          --max_concurrency 256（请求数，超出则 429）、--cache_tokens 262144、--prefill_tokens 8192、
          --images 10、--videos 3、--max_body_mb 64、--request_timeout 600、--shutdown_timeout 60、
          --max_connections 2048、--media_timeout 60
日志      --log_requests   每个请求一行
媒体      --allow_local_media FOLDER（其中的 file:/// URL）、--allow_media_hosts HOST,HOST（可为内网）、
          --allow_private_media

ernie-tune serve FOLDER --engine fastdeploy [--tensor_parallel_size 8 --quantization wint4 …]
[--print] 在已安装 FastDeploy 的机器上启动其服务器并等待就绪；--print 只显示命令。""",
    "ui": """ernie-tune ui [FOLDER] [--host 127.0.0.1] [--port 7860]

浏览器中的工作室，管理 FOLDER（默认：当前文件夹）：检查数据、填写并启动训练、查看曲线、
比较两个模型、人工评判回答、导出与部署。不触碰 FOLDER 之外的文件。训练是独立的进程：
关闭网页或工作室后继续运行。默认只有本机可以打开；使用其他 --host 时要求密钥，
密钥会打印出来，或取自 ERNIE_TUNE_UI_KEY。不向任何人发送数据。""",
    "judge": """ernie-tune judge [MODEL] ROWS [--host 127.0.0.1] [--port 7860]

打开工作室评判 ROWS：MODEL（模型文件夹，或某次训练的 output_dir）的回答；不给 MODEL 时，
评判各行自带的回答（来自 `ernie-tune predict --n 4`，或已有评判的数据）。ROWS、其图片与 MODEL
可在任何位置；MODEL 也可为 nano。
用按键挑选、排序、评分、标好坏、改写；DPO、KTO、UPO、奖励模型与 SFT 可读的数据逐行写入
当前文件夹的 judgements/。""",
    "export": """ernie-tune export FOLDER [ADAPTER …] --output_dir OUT [--layout paddle] [--quantization
wint4] [--calib rows.jsonl] …

写出完整并经过校验的模型文件夹，其中已合并适配器：权重、分词器、模型卡、serve.sh、
export_report.json。只给一个适配器时，由其设置找到基础模型。

--layout paddle|pt|hf      供 FastDeploy 的 Paddle 布局（默认）、-PT 版的布局、transformers 5 的布局
--quantization none|wint8|wint4|mix    FastDeploy 将量化到的类型；wint4：专家为 int4，其余 int8；
                                       mix：视觉专家也为 int8
--quantization weight_only_mix|weight_only_int8|weight_only_int4    （配合 --emit packed）与训练加载时
                           weight_quantize_algo 所得逐位相同：int4 每 64 行一个缩放因子，更接近原权重；
                           FastDeploy 无法读取
--method rtn|clip|gptq     选取 int4 编码的方法（默认 clip）；有 --calib FILE 时按各层所见的数据
--calib FILE、--calib_rows 128、--eval FILE    用于选取的数据，以及用于校验与评分的数据
--target_tp N              将一起提供服务的卡数：各卡有自己的缩放因子
--emit weights|cache|packed    权重（默认）；另附 FastDeploy 的加载缓存；或压缩编码：可作为 `ernie-tune train` 的底座，
                               也可用 `ernie-tune serve` 部署
--awq 0.25                 先把激活感知的缩放合并进权重（需要 --calib）
--max_shard_size 5GB、--port 8180、--verify full|files、--eval_max_samples 200、
--eval_max_new_tokens 32""",
    "download": """ernie-tune download NAME [--from huggingface|modelscope|aistudio] [--to FOLDER]

把模型 NAME（所有者/模型，如 baidu/ERNIE-4.5-0.3B-PT；已发布模型的所有者会自动换成该模型库的）
下载到模型库的缓存或 FOLDER，并与模型库的校验和核对。中断后再次执行同一命令即继续。
打印文件夹，train、chat、serve 与 predict 都可用它作为模型。需要模型库自己的软件包：
pip install huggingface_hub、modelscope 或 aistudio-sdk。""",
    "push": """ernie-tune push FOLDER NAME [--to huggingface|modelscope|aistudio] [--public true] [--message
TEXT]

把 FOLDER（某次训练的 output_dir，或导出的文件夹）中的模型或适配器上传到仓库 NAME（所有者/模型），
除非 --public true，否则私有：权重，模型、分词器与适配器的设置，模型卡；不含检查点、日志、数据与回答。
上传后与本地文件核对。中断后再次执行同一命令即继续。令牌取自模型库的客户端（其登录，或
HF_TOKEN、MODELSCOPE_API_TOKEN、AISTUDIO_ACCESS_TOKEN）。""",
    "plot": """ernie-tune plot RUN_FOLDER... [--name loss] [--svg FILE]

在终端的同一张图上绘制一次或多次运行所记录的值；--svg 把所有运行的全部曲线写入文件。""",
    "demo": """ernie-tune demo [key=value | --key value ...]

随包附带的小型 ERNIE-4.5-VL（nano）在 CPU 上用几分钟学会识别手写数字（examples/digits）：先用 LoRA 从给出的 1,500 条
答案学习；然后只从 50 条重新开始，再从自己的回答学习，由检查器评判（RLVR）。所给设置用于第一次训练；其余的步数不超过它。""",
    "init": """ernie-tune init [FOLDER] [key=value | --key value …]

按所给的阶段、模型与方法写出 FOLDER/run.yaml（默认：当前文件夹），每行都有注释，例如
`ernie-tune init my_run stage=DPO fine_tuning=Full model=./my_model`。它可直接训练，并留出十分之一的数据。
未给 train_dataset_path 时，另写出 FOLDER/data/train.jsonl，含几行示例数据与图片。
本机没有模型时：model=nano，即随包附带的小模型；从头训练：model=tiny-a（另有 small、tiny-b、tiny-c）。不覆盖任何文件。""",
    "estimate": """ernie-tune estimate MODEL|FILE.yaml [key=value | --key value ...] [--json]

逐项列出一次训练在每张卡上的需求与每步用时；哪种并行布局最好，放不下时须改什么。
MODEL：模型库名称、预设或文件夹，会为它搜索布局。FILE：按其所写。
YAML 文件的每个设置，以及：cards=8  card=h800-80g|a100-40g|80g|cpu-16g
visual_tokens=4096（每个微批）  row_tokens=600（最长的行，若小于 max_seq_len）。--json：数值。
`ernie-tune estimate --table`：launch/README.md 中的表格。""",
    "validate": """ernie-tune validate run.yaml [key=value | --key value …]

不加载 paddle，检查名称、类型、选项、范围与组合，本版本能否训练所要求的内容，模型能否按并行度切分，
并指出尚不存在的文件；打印每个有效的设置及其来处。其输出本身就是可重复该训练的 YAML 文件。""",
    "data": """ernie-tune data check FILE… [--eval FILE] [--fix [--drop] [--force]] [--json]
                      [--html [PATH.html]]
                      [--max-seq-len N] [--decode N|all] [--limit N]
ernie-tune data show FILE [--row N]
ernie-tune data stats FILE… [--decode N|all]
ernie-tune data convert FILE… --to messages|sharegpt|alpaca|pairs [--out NEW.jsonl]
FILE 为 jsonl、json、csv、tsv、parquet 或 txt，文件夹，通配路径，dataset_info.json 中的名称；check 与 stats
也可用 run.yaml，并采用其中的评测文件、格式与 max_seq_len。通用：--format NAME、--media-dir FOLDER、
--dataset-dir FOLDER、--tokenizer FOLDER（默认：自带的小分词器）、
--template hf|ernie_vl|ernie_vl_nothink。

check    指出哪里有什么问题、如何修复；有错误时退出码为 1。--fix 写出 FILE.fixed.jsonl，
         --drop 去掉无法修复的行，--force 替换已有的文件；--html 写出含数据行与图片、问题与统计的网页（FILE.check.html，或
         PATH.html）；--json 打印一个对象；--decode 打开前 N 张图片，其余逐渐减少（默认 200）；
         --limit 每类显示 N 个问题（默认 20，0：全部）；--stage NAME 还指出该阶段不能使用的行。
         名称以 _ 开头的列或键是有意不用的；文本中的 \\<image> 指这个词，而不是图片。
show     按模型所见打印一行，并标出训练的文本。--row 为行号，与消息中的相同。
stats    打印长度、语言、图片，以及对 image_max_pixels 的建议。
convert  写出 FILE.FORMAT.jsonl；该格式无法表达的行会被拒绝。""",
    "doctor": """ernie-tune doctor [--dist [--nproc N]] [--card [DEVICE]]

打印版本、处理器、内存、磁盘、显卡、端口与模型库令牌（有或无），然后指出可疑之处与修复办法，
可直接粘贴到问题报告中。--dist：每张卡启动一个进程（或 N 个，CPU 上也可以；多台机器上用 NNODES、RANK、
MASTER_ADDR、MASTER_PORT），并测量它们之间的通信；缺失或不答复的进程会在 60 秒内被指出。
--card：显卡（gpu:0 或 DEVICE；cpu 则以 CPU 代替）的计算结果是否与 CPU 相同，有多快？
需要几分钟，不下载任何内容；有一行不对时退出码为 1。""",
    "version": """ernie-tune version

打印本库的版本。""",
    "help": """ernie-tune help [VERB | SETTING | STAGE | --all [--html[=PATH.html]]]

解释一个命令、一个阶段，或一个设置的取值、默认值与其他写法。--all：全部设置；
--html：写成网页 ernie_tune_settings.html。不带参数：列出所有命令。""",
}
