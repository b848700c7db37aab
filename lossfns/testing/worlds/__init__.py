"""What a loss learns: small problems whose solution is known exactly, by enumeration and without sampling.

A ``World`` is a small tree of tokens with rewards, preferences, labels, data or a teacher. ``learn`` takes exact
gradient steps in it. ``lessons`` lists, for each loss of the library, the worlds, the point that the loss reaches in
each, and why: the optimum, or the biased point of theory. ``advice`` describes in words where any loss leads.

    >>> from lossfns.testing.worlds import lessons
    >>> for lesson in lessons("dpo"):
    ...     print(lesson.world.name, lesson.steps, lesson.holds(), lesson.says)
    answers 15 True ends where the oracle's expected gradient is 0
    answers 12 True the margin of theory
    answers 12 True the margin of theory
"""

from lossfns.testing.worlds.advice import advice as advice
from lossfns.testing.worlds.lesson import CLOSE as CLOSE
from lossfns.testing.worlds.lesson import Lesson as Lesson
from lossfns.testing.worlds.lessons import lessons as lessons
from lossfns.testing.worlds.problems import answers as answers
from lossfns.testing.worlds.problems import bandit as bandit
from lossfns.testing.worlds.problems import candidates as candidates
from lossfns.testing.worlds.problems import corpus as corpus
from lossfns.testing.worlds.problems import judged as judged
from lossfns.testing.worlds.problems import letters as letters
from lossfns.testing.worlds.problems import reward_model as reward_model
from lossfns.testing.worlds.problems import teacher as teacher
from lossfns.testing.worlds.problems import tree as tree
from lossfns.testing.worlds.problems import two_arms as two_arms
from lossfns.testing.worlds.steps import distance as distance
from lossfns.testing.worlds.steps import learn as learn
from lossfns.testing.worlds.world import Policy as Policy
from lossfns.testing.worlds.world import Unit as Unit
from lossfns.testing.worlds.world import World as World
