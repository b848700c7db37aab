// Some losses of the golden vectors in plain JavaScript: value and gradient by hand, no library.
//
//     lossfns vectors run --cmd 'node examples/vectors.mjs'
//
// One request a line on standard input, one reply a line on standard output (docs/vectors.md). What follows are the
// numbers that implementations get wrong. Change one, run the vectors again, and read the name of the bug.
import { createInterface } from 'node:readline'

const RATIO_SIGN = 1 // r = exp(lp − old); −1: ratio-inverted
const KL_SIGN = 1 // the KL pulls towards the reference; −1: kl-sign
const KL_CAP = 20 // nats beyond which k3 and the sampler's weight stop
const DDOF = 1 // the group's std divides by n − 1; 0: std-over-n
const STD_EPS = 1e-6 // added to the group's std
const ONE = 1 // log-odds = a − log(1 − e^a); 1.0001: log-odds-biased
const LEAST_REST = 1e-15 // the least 1 − p that the log-odds see
const CHOSEN = 0 // datum 2i is the chosen one; 1: sides-swapped
const DENOMINATOR_EPS = 0 // added to the denominator; 1: epsilon-in-denominator
const EMPTY_COUNTS = 0 // what a fully masked sequence adds to a count; 1: empty-sequence-counted
const LOGPROB_SLACK = 1e-4 // how far above 0 rounding may carry a logprob

const sum = xs => xs.reduce((a, b) => a + b, 0)
const clamp = (x, low, high) => Math.min(Math.max(x, low), high)
const sigmoid = x => 1 / (1 + Math.exp(-x))
const softplus = x => Math.max(x, 0) + Math.log1p(Math.exp(-Math.abs(x))) // −log σ(−x)
const zip = (...rows) => rows[0].map((_, i) => rows.map(row => row[i]))
const each = (object, f) => Object.fromEntries(Object.entries(object).map(([name, x]) => [name, f(x, name)]))
const isAlive = weights => weights.some(w => w !== 0)

// Rows: what stands in a masked slot is never computed with
const difference = (weights, left, right) =>
  zip(weights, left, right).map(rows => zip(...rows).map(([w, x, y]) => (w !== 0 ? x - y : 0)))

const averaged = (weights, values) => // Σ w·x / Σ w over a sequence, at each of its active tokens
  zip(weights, values).map(([ws, xs]) => {
    const mean = sum(ws.map((w, t) => (w !== 0 ? w * xs[t] : 0))) / (sum(ws) || 1)
    return ws.map(w => (w !== 0 ? mean : 0))
  })

const normalised = weights => // w / Σw within each sequence
  weights.map(ws => ws.map(w => (w !== 0 ? w / sum(ws) : 0)))

// One reduction: L = Σ share·term / D
function divisor({ weigh, length }, mass, alive, all, denominator) {
  if (weigh === 'token_sum' || weigh === 'pair_sum') return 1
  const count = alive + EMPTY_COUNTS * (all - alive)
  const own = { token_mean: mass, fixed_length: count * length }[weigh] ?? count
  return (denominator ?? (own || 1)) + DENOMINATOR_EPS
}

function reduce(term, weights, config, denominator) {
  const shares = config.weigh === 'sequence_mean' ? normalised(weights) : weights
  const D = divisor(config, sum(weights.flat()), weights.filter(isAlive).length, weights.length, denominator)
  let loss = 0
  const grad = shares.map((row, i) =>
    row.map((share, t) => {
      if (share === 0) return 0
      const [value, slope] = term(i, t)
      loss += (share * value) / D
      return (share * slope) / D
    })
  )
  return { loss, grad }
}

function reducePairs(term, scores, weights, config, denominator) {
  const heads = weights.map((_, i) => i).filter(i => i % 2 === 0)
  const pairs = heads.filter(i => isAlive(weights[i]) && isAlive(weights[i + 1]))
  const D = divisor(config, 0, pairs.length, heads.length, denominator)
  const slopes = weights.map(() => 0)
  let loss = 0
  for (const i of pairs) {
    const [won, lost] = [i + CHOSEN, i + 1 - CHOSEN]
    const [value, up, down] = term(scores[won], scores[lost])
    loss += value / D
    slopes[won] = up / D
    slopes[lost] = down / D
  }
  return { loss, grad: weights.map((ws, i) => ws.map(w => (w !== 0 ? w * slopes[i] : 0))) }
}

// Likelihood
const crossEntropy = (c, ...how) => reduce((i, t) => [-c.logprobs[i][t], -1], c.weights, ...how)
const reinforce = (c, ...how) =>
  reduce((i, t) => [-c.advantages[i][t] * c.logprobs[i][t], -c.advantages[i][t]], c.weights, ...how)

// Policy gradient
const ratio = (d, cap) => Math.exp(cap === null ? d : clamp(d, -cap, cap))

function surrogate(d, A, { clip = [-Infinity, Infinity], dual_clip, log_ratio_cap: cap }) {
  const r = ratio(d, cap)
  const cut = -clamp(r, ...clip) * A
  let [value, slope] = cut > -r * A ? [cut, 0] : [-r * A, Math.abs(d) <= (cap ?? Infinity) ? -r * A : 0]
  if (dual_clip !== null && A < 0 && -dual_clip * A < value) [value, slope] = [-dual_clip * A, 0]
  return [value, RATIO_SIGN * slope]
}

function cispo(d, A, { clip, log_ratio_cap: cap }, lp) { // the bounds limit a weight, which is a constant
  const w = clamp(ratio(d, cap), ...clip)
  return [-w * A * lp, -w * A]
}

const dro = (d, A, { beta }, lp) => [(beta * d * d) / 2 - A * lp, beta * d - A]
const TERMS = { cispo, dro }

function samplerWeights(c, config) { // min(exp(old − sampler), cap) of a token, or of the sequence's sum or mean
  if (config.tis_cap === null) return c.weights.map(row => row.map(() => 1))
  const gaps = difference(c.weights, c.old_logprobs, c.sampler_logprobs)
  const [sums, means] = [weightedSum(c.weights, gaps), averaged(c.weights, gaps)]
  const level = { sequence: gaps.map((row, i) => row.map(() => sums[i])), geometric: means }[config.tis_level] ?? gaps
  return level.map(row => row.map(x => Math.min(Math.exp(clamp(x, -KL_CAP, KL_CAP)), config.tis_cap)))
}

function divergence(x, kl) { // of x = ref − lp; the slope is in lp
  if (kl === 'k1') return [-x, 1]
  if (kl === 'k2') return [(x * x) / 2, -x]
  const [c, inside] = [clamp(x, -KL_CAP, KL_CAP), Math.abs(x) <= KL_CAP]
  return [Math.expm1(c) - c, inside ? -Math.expm1(c) : 0]
}

function policy(c, config, denominator, loss) {
  const sequence = loss.startsWith('gspo')
  const byToken = difference(c.weights, c.logprobs, c.old_logprobs).map(row => row.map(d => RATIO_SIGN * d))
  const d = sequence ? averaged(c.weights, byToken) : byToken
  const rho = samplerWeights(c, config)
  const l = TERMS[loss] ?? surrogate
  const term = (i, t) => l(d[i][t], c.advantages[i][t], config, c.logprobs[i][t]).map(x => rho[i][t] * x)
  const main = reduce(term, c.weights, config, denominator)
  if (loss === 'gspo') main.grad = zip(normalised(c.weights), main.grad).map(([ws, row]) => ws.map(w => w * sum(row)))
  if (loss !== 'grpo') return main
  const x = difference(c.weights, c.ref_logprobs, c.logprobs)
  const pull = (i, t) => divergence(x[i][t], config.kl).map(y => KL_SIGN * config.kl_beta * y)
  const kl = reduce(pull, c.weights, config, denominator)
  return { loss: main.loss + kl.loss, grad: zip(main.grad, kl.grad).map(rows => zip(...rows).map(sum)) }
}

// Preference
const weightedSum = (weights, values) =>
  zip(weights, values).map(rows => sum(zip(...rows).map(([w, x]) => (w !== 0 ? w * x : 0))))

function dpo(c, config, denominator) {
  const { beta, label_smoothing: eps } = config
  const term = (won, lost) => {
    const z = beta * (won - lost)
    const slope = beta * (eps * sigmoid(z) - (1 - eps) * sigmoid(-z))
    return [(1 - eps) * softplus(-z) + eps * softplus(z), slope, -slope]
  }
  const scores = weightedSum(c.weights, difference(c.weights, c.logprobs, c.ref_logprobs))
  return reducePairs(term, scores, c.weights, config, denominator)
}

function logOdds(a) { // log(p / (1 − p)) at p = e^a, and its slope; expm1 keeps what 1 − e^a would round away
  const rest = Math.max(ONE - 1 - Math.expm1(a), LEAST_REST)
  return [a - Math.log(rest), 1 + Math.exp(a) / rest]
}

function orpo(c, config, denominator) {
  const term = (won, lost) => {
    const [[oddsWon, slopeWon], [oddsLost, slopeLost]] = [logOdds(won), logOdds(lost)]
    const [gap, doubt] = [oddsLost - oddsWon, config.lam * sigmoid(oddsLost - oddsWon)]
    return [config.lam * softplus(gap) - won, -1 - doubt * slopeWon, doubt * slopeLost]
  }
  const shares = normalised(c.weights)
  return reducePairs(term, weightedSum(shares, c.logprobs), shares, config, denominator)
}

const LOSSES = { cross_entropy: crossEntropy, multi_target_cross_entropy: crossEntropy, reinforce, dpo, orpo }

// Advantages
function groupAdvantages(samples, { scale }) {
  refuse(!['std', 'none'].includes(scale), 'unknown_name', 'scale')
  refuse(samples.length === 0, 'empty_batch', 'rewards')
  refuse(samples.some(s => !Number.isFinite(s.reward)), 'not_finite', 'rewards')
  refuse(samples.some(s => s.group === undefined), 'missing_field', 'groups')
  return samples.map(({ reward, group }) => {
    const peers = samples.filter(s => s.group === group).map(s => s.reward)
    if (peers.every(r => r === peers[0])) return 0
    const mean = sum(peers) / peers.length
    const std = Math.sqrt(sum(peers.map(r => (r - mean) ** 2)) / (peers.length - DDOF))
    return scale === 'std' ? (reward - mean) / (std + STD_EPS) : reward - mean
  })
}

// What is refused
function refuse(isBad, code, field, datum) {
  if (isBad) throw Object.assign(new Error(`${field}: ${code}`), { code, field, datum })
}

const TOKEN_WEIGHINGS = ['token_mean', 'sequence_mean', 'sequence_sum_mean', 'fixed_length', 'token_sum']
const RATIO = ['advantages', 'old_logprobs']
const READS = { reinforce: ['advantages'], grpo: [...RATIO, 'ref_logprobs'], dpo: ['ref_logprobs'], orpo: [] }
const isSigned = loss => loss.endsWith('cross_entropy')
const isPairs = loss => loss === 'dpo' || loss === 'orpo'

function checkConfig(loss, config, denominator) {
  const outside = (name, isBad) => refuse(config[name] != null && isBad(config[name]), 'out_of_range', name)
  const among = (name, names) => refuse(name in config && !names.includes(config[name]), 'unknown_name', name)
  refuse(denominator !== undefined && !(denominator > 0), 'out_of_range', 'denominator')
  among('weigh', isPairs(loss) ? ['pair_mean', 'pair_sum'] : TOKEN_WEIGHINGS)
  among('tis_level', ['token', 'sequence', 'geometric'])
  among('kl', ['k1', 'k2', 'k3'])
  outside('clip', ([low, high]) => !(0 <= low && low <= 1 && 1 <= high))
  outside('dual_clip', c => !(c > 1))
  outside('label_smoothing', e => !(e >= 0 && e <= 0.5))
  for (const name of ['length', 'log_ratio_cap', 'tis_cap', 'beta']) outside(name, x => !(x > 0))
  for (const name of ['kl_beta', 'lam']) outside(name, x => !(x >= 0))
}

const shape = x => (Array.isArray(x) ? `[${x.map(shape)}]` : '')
function checkData(loss, config, data, denominator) {
  const reads = isSigned(loss) ? [] : READS[loss] ?? RATIO
  const names = ['weights', ...reads, ...(config.tis_cap != null ? ['sampler_logprobs'] : [])]
  refuse(data.length === 0, 'empty_batch', 'data')
  refuse(isPairs(loss) && data.length % 2 === 1, 'odd_pairs', 'data')
  data.forEach((datum, i) => {
    for (const name of names) {
      refuse(datum[name] === undefined, 'missing_field', name, i)
      refuse(shape(datum[name]) !== shape(datum.logprobs), 'length_mismatch', name, i)
    }
    const weights = datum.weights.flat()
    for (const name of ['logprobs', ...names]) {
      const seen = datum[name].flat().filter((_, t) => weights[t] !== 0)
      refuse(seen.some(x => !Number.isFinite(x)), 'not_finite', name, i)
      refuse(name.endsWith('logprobs') && seen.some(x => x > LOGPROB_SLACK), 'positive_logprob', name, i)
    }
    refuse(!isSigned(loss) && weights.some(w => w < 0), 'negative_weight', 'weights', i)
  })
  const rows = data.map(datum => datum.weights.flat())
  const lone = isPairs(loss) ? rows.findIndex((row, i) => !isAlive(row) && isAlive(rows[i ^ 1])) : -1
  refuse(lone >= 0, 'lone_side', 'weights', lone)
  refuse(denominator === undefined && !rows.some(isAlive), 'no_active_token', 'weights')
  const masses = { token_mean: [rows.flat()], sequence_mean: rows.filter(isAlive) }[config.weigh] ?? []
  refuse(denominator === undefined && masses.some(row => sum(row) <= 0), 'no_mass', 'weights')
}

// The protocol
const NUMBERS = { nan: NaN, inf: Infinity, '-inf': -Infinity }
const read = x => (Array.isArray(x) ? x.map(read) : NUMBERS[x] ?? x)
const write = x => (Number.isFinite(x) ? x : Number.isNaN(x) ? 'nan' : x > 0 ? 'inf' : '-inf')

function answer({ loss, config, data, denominator }) {
  const others = 'importance_sampling ppo dapo grpo gspo gspo_token cispo dro group_advantages'.split(' ')
  if (!(loss in LOSSES || others.includes(loss))) return { unsupported: `the loss ${loss}` }
  const rows = data.map(datum => each(datum, (x, name) => (name === 'group' ? x : read(x))))
  if (loss === 'group_advantages') return { advantages: groupAdvantages(rows, config).map(write) }
  checkConfig(loss, config, denominator)
  checkData(loss, config, rows, denominator)
  const columns = each(rows[0], (_, name) => rows.map(row => row[name].flat()))
  const result = (LOSSES[loss] ?? policy)(columns, config, denominator, loss)
  const like = (x, flat) => (Array.isArray(x) ? x.map(part => like(part, flat)) : write(flat.shift()))
  return { loss: write(result.loss), grad: result.grad.map((row, i) => like(rows[i].logprobs, [...row])) }
}

for await (const line of createInterface({ input: process.stdin })) {
  const request = JSON.parse(line)
  let reply
  try {
    reply = answer(request)
  } catch (error) {
    reply = { error: { code: error.code ?? 'crash', message: error.message, field: error.field, datum: error.datum } }
  }
  console.log(JSON.stringify({ id: request.id, ...reply }))
}
