"""The focal loss of ``docs/loop.md``, as a file. ``docs/findings.md`` has the results."""

from lossfns import Loss, token_mean


def focal(gamma=2.0):
    def terms(t):
        return -((1 - t.logprobs.exp()) ** gamma) * t.logprobs, {}

    knobs = {"gamma": gamma}
    return Loss(name="focal", knobs=knobs, reads=(), share=token_mean.share, count=token_mean.count, terms=terms)
