"""The local backend: training, reference, sampling and service clients with the calls of the hosted services."""

from lossfns.backend.client.reference import LocalReferenceClient as LocalReferenceClient
from lossfns.backend.client.sampling import LocalSamplingClient as LocalSamplingClient
from lossfns.backend.client.service import LocalServiceClient as LocalServiceClient
from lossfns.backend.client.training import LocalTrainingClient as LocalTrainingClient
from lossfns.backend.futures import APIFuture as APIFuture
from lossfns.backend.model.decoder import Decoder as Decoder
from lossfns.backend.model.generate import generate as generate
from lossfns.backend.model.tokenizer import ByteTokenizer as ByteTokenizer
from lossfns.backend.types import AdamParams as AdamParams
from lossfns.backend.types import ForwardBackwardOutput as ForwardBackwardOutput
from lossfns.backend.types import SamplingParams as SamplingParams
from lossfns.logprobs.linear import linear_logprobs as linear_logprobs
