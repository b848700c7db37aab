"""The local reference backend: a model, a training client and a sampler behind the hosted APIs' calls."""

from lossfns.backend.client import LocalReferenceClient as LocalReferenceClient
from lossfns.backend.client import LocalTrainingClient as LocalTrainingClient
from lossfns.backend.futures import APIFuture as APIFuture
from lossfns.backend.logprobs import linear_logprobs as linear_logprobs
from lossfns.backend.model import Decoder as Decoder
from lossfns.backend.sampler import generate as generate
from lossfns.backend.sampling import LocalSamplingClient as LocalSamplingClient
from lossfns.backend.service import LocalServiceClient as LocalServiceClient
from lossfns.backend.tokenizer import ByteTokenizer as ByteTokenizer
from lossfns.backend.types import AdamParams as AdamParams
from lossfns.backend.types import ForwardBackwardOutput as ForwardBackwardOutput
from lossfns.backend.types import SamplingParams as SamplingParams
