"""Sounds made here, so that everything can be tried without downloading anything.

Each kind of sound is a short recipe. There are sweeps, vowels, bells, plucked strings, clicks,
noises, engines, and events that follow each other. SOURCE has 68 kinds. The training of the small
backbone in `weights/` began on them. TARGET has ten other kinds. They are the task that
`python train.py` adapts that backbone to.

TARGET consists of five pairs of opposites. Where one kind rises, the other falls. An average over
time hardly tells three of the pairs apart. It tells `eoe` from `oeo`, because each has more of
another vowel. It often tells `tone_noise_tone` from `noise_tone_noise`.

    wave = render("bell", index=0)  # (16000,) float32: one second at 16 kHz

A sound follows from its class, its index and a seed alone. Each index has its own pitch, tempo,
timbre, onset, level and background noise.
"""

import zlib

import numpy as np

from sounds.audio import RATE

SAMPLES = RATE  # a clip lasts one second
LATEST = RATE // 8  # a sound begins at this sample or before it

# ----------------------------------------------------------------- blocks: arrays in, arrays out


def times(seconds):
    """The time of every sample of a sound, in seconds."""
    return np.arange(int(seconds * RATE)) / RATE


def glide(seconds, *points):
    """A curve through `points`, which lie at equal distances in time.

    The curve is straight on a logarithmic scale, because the ear hears pitch on such a scale.
    """
    n = int(seconds * RATE)
    return np.exp(np.interp(np.linspace(0, 1, n), np.linspace(0, 1, len(points)), np.log(points)))


def tone(hz, harmonics):
    """A tone whose pitch follows the curve `hz`. harmonics[0] is the level of the fundamental.

    A harmonic above half the sampling rate would come back as a wrong pitch. It is left out.
    """
    cycles = (np.cumsum(hz / RATE) % 1).astype(np.float32)
    return sum(
        np.float32(level) * np.sin(2 * np.pi * k * cycles)
        for k, level in enumerate(harmonics, 1)
        if k * hz.max() < RATE / 2
    )


def ping(hz, half_life, level=1):
    """A sine whose pitch follows `hz` and whose level halves every `half_life` seconds."""
    samples = np.arange(len(hz), dtype=np.float32)
    return tone(hz, [level]) * np.exp2(-samples / (half_life * RATE))


def sine(hz, n, phase=0):
    """A sine of `n` samples, which moves the pitch or the level of a sound up and down."""
    return np.sin(2 * np.pi * hz * np.arange(n) / RATE + phase)


def buzz(hz):
    """A sawtooth, which has all harmonics. Vocal folds and cylinders sound like it."""
    return (2 * (np.cumsum(hz / RATE) % 1) - 1).astype(np.float32)


def colour(sound, gain):
    """A filter. Every frequency of the sound is multiplied by gain(frequency in Hz)."""
    hz = np.fft.rfftfreq(SAMPLES, 1 / RATE)  # one second: some lengths make a slow transform
    spectrum = np.fft.rfft(sound, SAMPLES) * gain(hz)
    return np.fft.irfft(spectrum)[: len(sound)].astype(np.float32)


def hiss(rng, seconds, low, high):
    """Noise between two frequencies in Hz, with soft edges."""
    return colour(
        rng.standard_normal(int(seconds * RATE), np.float32),
        lambda hz: 1 / (1 + (low / (hz + 1)) ** 8) / (1 + (hz / high) ** 8),
    )


def shaped(sound, attack=0.01, release=0.03):
    """The sound with a linear fade at both ends, so that the ends do not click.

    `attack` and `release` are the lengths of the fades in seconds.
    """
    n = len(sound)
    fade_in = np.arange(n) / (attack * RATE + 1)
    fade_out = np.arange(n, 0, -1) / (release * RATE + 1)
    return sound * np.minimum(np.minimum(fade_in, fade_out), 1).astype(np.float32)


def blend(sounds, position):
    """Sounds of one length, faded into each other.

    At each sample, position 1 is the second sound and 1.5 is half the second and half the third.
    """
    return sum(
        np.clip(1 - abs(position - i), 0, 1).astype(np.float32) * sound
        for i, sound in enumerate(sounds)
    )


def at(events):
    """One second with each (start in seconds, sound) added to it. What reaches beyond is lost."""
    clip = np.zeros(2 * SAMPLES, np.float32)
    for seconds, sound in events:
        start = int(seconds * RATE)
        clip[start : start + len(sound)] += sound
    return clip[:SAMPLES]


def row(sounds, gap):
    """Sounds one after another, with `gap` seconds of silence after each."""
    return np.concatenate([np.pad(sound, (0, int(gap * RATE))) for sound in sounds])


def heights(base, size, steps):
    """Frequencies in Hz: `base`, raised by each of `steps` times an interval of `size` octaves."""
    return [base * 2 ** (size * step) for step in steps]


def pitch(rng, low, high):
    """A frequency in Hz, uniform on a logarithmic scale."""
    return np.exp(rng.uniform(np.log(low), np.log(high)))


def voice(rng):
    """A random timbre: the levels of one to six harmonics."""
    levels = rng.uniform(0.2, 1, rng.integers(1, 7))
    levels[0] = 1
    return levels / np.sqrt(np.arange(1, len(levels) + 1))


# ---------------------------------------------- families: a random generator in, one sound out

# A family makes the kinds of sound that differ in a few arguments only. The tables below give
# these arguments. The order of the random draws decides how every sound of a family turns out.


def sweep(rng, *steps):
    """One tone that glides through `steps`, in units of a random interval."""
    size = rng.uniform(0.5, 1.6)
    base = pitch(rng, 250, 900)
    hz = glide(rng.uniform(0.5, 1), *heights(base, size, steps))
    return shaped(tone(hz, voice(rng)))


def short_sweeps(rng, rate, shortest, steps, directions):
    """A short sweep, played `rate` times a second: forwards (1) or backwards (-1)."""
    pitches = heights(pitch(rng, 500, 1500), rng.uniform(0.5, 1.2), steps)
    timbre = voice(rng)
    hz = glide(rng.uniform(shortest, 0.9) / rate, *pitches)
    return at(
        (i / rate, shaped(tone(hz[::direction], timbre), 0.005, 0.01))
        for i, direction in enumerate(directions)
    )


def chirps(rng, *steps):
    """The same short sweep again and again, 4 to 9 times a second."""
    rate = rng.uniform(4, 9)
    return short_sweeps(rng, rate, 0.4, steps, [1] * int(rate))


def calls(rng, *directions):
    """Short sweeps up (1) or down (-1), three to four of them a second."""
    return short_sweeps(rng, rng.uniform(3, 4), 0.5, (0, 1), directions)


def steady(rng, *harmonics):
    """One tone of a constant pitch with the given levels of its harmonics."""
    hz = glide(rng.uniform(0.4, 1), pitch(rng, 200, 1200))
    return shaped(tone(hz, harmonics))


def chord(rng, *ratios):
    """Tones at the same time, whose pitches are `ratios` of the lowest."""
    seconds = rng.uniform(0.5, 1)
    base = pitch(rng, 200, 600)
    timbre = voice(rng)
    return shaped(sum(tone(glide(seconds, base * ratio), timbre) for ratio in ratios))


def wobble(rng, rate, pitch_depth, level_depth=0):
    """Vibrato (of the pitch, in octaves) or tremolo (of the level, 0 to 1) at a rate in Hz."""
    swing = sine(rng.uniform(*rate), int(rng.uniform(0.7, 1) * RATE), rng.uniform(0, 6))
    hz = pitch(rng, 300, 1200) * 2 ** (pitch_depth * swing)
    return shaped(tone(hz, voice(rng)) * (1 - level_depth * (0.5 + 0.5 * swing)))


def siren(rng):
    """Two pitches in turn, without a glide between them."""
    turns = times(rng.uniform(0.75, 1)) * rng.uniform(2.5, 4) + rng.uniform(0, 2)
    hz = pitch(rng, 300, 1000) * 2 ** (rng.uniform(0.3, 0.6) * (turns % 2 > 1))
    return shaped(tone(hz, voice(rng)))


FORMANTS = {  # Hz; Peterson and Barney, "Control methods used in a study of the vowels", 1952, men
    "i": (270, 2290, 3010),
    "e": (530, 1840, 2480),
    "a": (730, 1090, 2440),
    "o": (570, 840, 2410),
    "u": (300, 870, 2240),
    "er": (490, 1350, 1690),
}


def vowel(rng, *names):
    """A buzz through the resonances of the vocal tract. Several vowels glide into each other."""
    seconds = rng.uniform(0.4, 0.95)
    size = rng.uniform(0.9, 1.2)
    folds = buzz(glide(seconds, *pitch(rng, 90, 260) * rng.uniform(0.85, 1.15, 3)))

    def spoken(name):  # each resonance is 180 Hz wide
        return colour(
            folds,
            lambda hz: sum(
                level / (1 + ((hz - size * formant) / 90) ** 2)
                for level, formant in zip((1, 0.6, 0.3), FORMANTS[name], strict=True)
            ),
        )

    position = np.interp(np.linspace(0, 1, len(folds)), [0.2, 0.8], [0, len(names) - 1])
    return shaped(blend(map(spoken, names), position), 0.03, 0.05)


def strike(rng, low, high, ratios, half_life):
    """Something hit. Its partials are `ratios` of a pitch. The upper ones fade faster."""
    base = pitch(rng, low, high)
    life = rng.uniform(*half_life)
    seconds = rng.uniform(0.5, 0.95)
    ratios = rng.uniform(0.98, 1.02, len(ratios)) * ratios
    partials = (
        ping(glide(seconds, base * ratio), life / ratio**0.7, rng.uniform(0.3, 1))
        for ratio in ratios
    )
    return shaped(sum(partials), 0.002, 0.05)


def string(hz, seconds, half_life):
    """A plucked string with seven harmonics.

    The n-th harmonic is n times as weak as the first. It fades n times as fast.
    """
    t = times(seconds)
    first = np.exp2(-t / half_life) * np.exp(2j * np.pi * hz * t)
    levels = [1 / n for n in range(7, 0, -1)]  # the n-th power of `first` is the n-th harmonic
    return shaped(np.polyval([*levels, 0], first).imag, 0.002, 0.02)


def strings(rng, *steps):
    """Strings plucked one after another at `steps`, in units of a random interval."""
    pitches = heights(pitch(rng, 150, 450), rng.uniform(0.3, 0.6), steps)
    wait = rng.uniform(0.13, 0.2)
    length = 0.9 - wait * (len(steps) - 1)
    life = rng.uniform(0.04, 0.15)
    return at((i * wait, string(hz, length, life)) for i, hz in enumerate(pitches))


def click(rng):
    """A few milliseconds of a resonance."""
    return ping(glide(0.012, pitch(rng, 800, 4000)), rng.uniform(0.001, 0.003))


def clicks(rng, *rates):
    """Clicks whose number per second follows `rates`, each times a random factor."""
    rate = glide(1, *(rate * rng.uniform(0.8, 1.25) for rate in rates))
    count = np.cumsum(rate / RATE) + rng.random()
    starts = np.flatnonzero(np.diff(count.astype(int))) / RATE
    one = click(rng)
    return at((start, one) for start in starts)


def gallop(rng):
    """Pairs of clicks. The second click follows a quarter of a bar after the first."""
    bars = rng.uniform(3, 5)  # a second
    one = click(rng)
    start = rng.uniform(0, 0.2)
    beats = [bar + part for bar in range(int(bars) + 1) for part in (0, 0.25)]
    return at((start + beat / bars, one) for beat in beats)


def scatter(rng, density):
    """Clicks at random times and levels. A few are a crackle, and many are rain."""
    count = rng.poisson(rng.uniform(*density))
    kinds = [click(rng) for _ in range(8)]
    starts = rng.uniform(0, 0.98, max(count, 3))
    return at((start, rng.lognormal(0, 0.8) * kinds[rng.integers(8)]) for start in starts)


def drips(rng):
    """Drops into water, which are short blips of rising pitch."""
    events = []
    for start in np.arange(rng.uniform(0, 0.2), 0.95, rng.uniform(0.15, 0.3)):
        hz = pitch(rng, 500, 1200)
        drop = ping(glide(rng.uniform(0.03, 0.06), hz, 2 * hz), 0.02)
        events.append((start, shaped(drop, 0.002)))
    return at(events)


def band(rng, low, high):
    """Noise between two frequencies, which are both moved by one random factor."""
    shift = rng.uniform(0.8, 1.25)
    return shaped(hiss(rng, rng.uniform(0.4, 1), low * shift, high * shift))


def moving_band(rng, start, end):
    """Noise that moves from one frequency to another: three bands, faded into each other."""
    seconds = rng.uniform(0.5, 1)
    centres = rng.uniform(0.8, 1.25) * np.geomspace(start, end, 3)
    bands = [hiss(rng, seconds, centre / 1.4, centre * 1.4) for centre in centres]
    return shaped(blend(bands, np.linspace(0, 2, len(bands[0]), dtype=np.float32)))


def wind(rng, seconds):
    """Noise two octaves wide."""
    centre = pitch(rng, 600, 4000)
    return hiss(rng, seconds, centre / 2, centre * 2)


def pulsing_noise(rng):
    """Noise in four to seven pulses a second."""
    noise = wind(rng, rng.uniform(0.7, 1))
    swing = sine(rng.uniform(4, 7), len(noise))
    return shaped(noise * (0.5 + 0.5 * swing) ** 2)


def swelling_noise(rng, start, end):
    """Noise that grows louder or softer, from the level `start` to the level `end`."""
    seconds = rng.uniform(0.6, 1)
    return shaped(wind(rng, seconds) * glide(seconds, start, end))


def engine(rng, *speeds):
    """Combustion through an exhaust. Its rate is 25 to 60 Hz times each of `speeds` in turn.

    The noise follows the rhythm of the cylinders.
    """
    seconds = rng.uniform(0.7, 1)
    base = pitch(rng, 25, 60)
    exhaust = pitch(rng, 150, 500)
    strokes = buzz(glide(seconds, *(base * speed for speed in speeds)))
    noise = rng.standard_normal(len(strokes), np.float32) * np.clip(strokes, 0, 1) ** 3
    resonance = colour(strokes + 0.7 * noise, lambda hz: 1 / (1 + ((hz - exhaust) / exhaust) ** 2))
    return shaped(resonance, 0.05, 0.05)


def insect(rng, carrier, pulse, song):
    """A tone in pulses, and the pulses in phrases. All three arguments are ranges in Hz."""
    t = times(rng.uniform(0.8, 1))
    wave = tone(np.full(len(t), pitch(rng, *carrier)), [1, 0.3])
    pulses = 0.5 - 0.5 * np.cos(2 * np.pi * rng.uniform(*pulse) * t)
    return wave * pulses * ((t * rng.uniform(*song) + rng.random()) % 1 < 0.6)


def beep(hz, seconds, timbre):
    """A tone of a constant pitch."""
    return shaped(tone(glide(seconds, hz), timbre), 0.01, 0.02)


def beeps(rng, *lengths):
    """One pitch in a rhythm of short (1) and long (3) beeps, as in Morse code."""
    unit = rng.uniform(0.06, 0.085)
    hz = pitch(rng, 300, 1500)
    timbre = voice(rng)
    return row([beep(hz, unit * length, timbre) for length in lengths], unit)


def notes(rng, *steps):
    """Notes at `steps`, in units of a random interval of three to eight semitones."""
    length = rng.uniform(0.14, 0.25)
    pitches = heights(pitch(rng, 300, 700), rng.uniform(3, 8) / 12, steps)
    timbre = voice(rng)
    sounds = [beep(hz, length, timbre) for hz in pitches]
    return row(sounds, rng.uniform(0, 0.05))


def tone_and_noise(rng, *kinds):
    """A tone, a noise or a click, in the given order."""
    length = rng.uniform(0.12, 0.22)
    hz = pitch(rng, 300, 1500)
    timbre = voice(rng)
    centre = pitch(rng, 800, 4000)
    gap = rng.uniform(0.02, 0.08)

    def make(kind):
        if kind == "tone":
            return beep(hz, length, timbre)
        if kind == "noise":
            return 2 * shaped(hiss(rng, length, centre / 1.5, centre * 1.5))
        return row([1.5 * click(rng)], length / 2)

    return row([make(kind) for kind in kinds], gap)


def hisses(rng, *steps):
    """Bursts of noise, dark (0) and bright (1), 1.5 to 2.5 octaves apart."""
    length = rng.uniform(0.22, 0.28)
    centres = heights(pitch(rng, 400, 1000), rng.uniform(1.5, 2.5), steps)
    gap = rng.uniform(0.02, 0.06)
    bursts = [shaped(hiss(rng, length, centre / 1.3, centre * 1.3)) for centre in centres]
    return row(bursts, gap)


# ---------------------------------------------------------------------------------- the classes

# The kind of sound, its family, and the arguments of the family after the random generator.
SOURCE = {
    # Pitch that moves
    "hill": (sweep, 0, 1, 0),
    "valley": (sweep, 1, 0, 1),
    "slow_vibrato": (wobble, (3, 5), 0.15),
    "fast_vibrato": (wobble, (9, 14), 0.15),
    "slow_tremolo": (wobble, (3, 5), 0, 0.9),
    "fast_tremolo": (wobble, (10, 16), 0, 0.9),
    "wailing_siren": (wobble, (1, 1.8), 0.5),
    "two_tone_siren": (siren,),
    # Tones that stay
    "whistle": (steady, 1),
    "organ": (steady, 1, 0.7, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15),
    "clarinet": (steady, 1, 0, 0.6, 0, 0.4, 0, 0.3, 0, 0.2),
    "fifth": (chord, 1, 1.5),
    "minor_second": (chord, 1, 1.06),
    "triad": (chord, 1, 1.26, 1.5),
    # Voices
    "vowel_i": (vowel, "i"),
    "vowel_a": (vowel, "a"),
    "vowel_u": (vowel, "u"),
    "vowel_er": (vowel, "er"),
    # Things hit and plucked
    "bell": (strike, 400, 1000, (1, 2, 2.4, 3, 4.5, 5.3), (0.12, 0.3)),
    "gong": (strike, 90, 200, (1, 1.6, 2.3, 3.1, 4.3, 5.9), (0.15, 0.4)),
    "wood_block": (strike, 500, 1300, (1, 2.6), (0.01, 0.03)),
    "pluck": (strings, 0),
    # Clicks
    "slow_clicks": (clicks, 6),
    "fast_clicks": (clicks, 20),
    "gallop": (gallop,),
    "crackle": (scatter, (8, 25)),
    "rain": (scatter, (120, 250)),
    "drips": (drips,),
    # Noises and machines
    "low_noise": (band, 150, 500),
    "high_noise": (band, 3000, 6000),
    "noise_pulses": (pulsing_noise,),
    "engine_runs": (engine, 1),
    "cricket": (insect, (3000, 5500), (25, 45), (3, 5)),
    "frog": (insect, (400, 900), (18, 28), (1.5, 3)),
    # One thing after another
    "yodel": (notes, 0, 1, 0),
    "dip": (notes, 1, 0, 1),
}
# Each row adds two kinds to SOURCE. The second has the arguments of the first in reverse order.
PAIRS = [
    ("rise", "fall", sweep, 0, 1),
    ("late_jump", "early_drop", sweep, 0, 0, 0, 1),
    ("chirps_up", "chirps_down", chirps, 0, 1),
    ("ai", "ia", vowel, "a", "i"),
    ("iu", "ui", vowel, "i", "u"),
    ("plucks_up", "plucks_down", strings, 0, 1, 2),
    ("clicks_faster", "clicks_slower", clicks, 5, 25),
    ("noise_up", "noise_down", moving_band, 500, 4000),
    ("noise_grows", "noise_fades", swelling_noise, 0.05, 1),
    ("engine_starts", "engine_stops", engine, 0.7, 2.5),
    ("doorbell", "cuckoo", notes, 0, 1),
    ("arpeggio_up", "arpeggio_down", notes, 0, 1, 2),
    ("dark_bright", "bright_dark", hisses, 0, 1),
    ("tone_noise", "noise_tone", tone_and_noise, "tone", "noise"),
    ("click_tone", "tone_click", tone_and_noise, "click", "tone"),
    ("dash_dot_dot", "dot_dot_dash", beeps, 3, 1, 1),
]
for first, second, family, *arguments in PAIRS:
    SOURCE[first] = (family, *arguments)
    SOURCE[second] = (family, *reversed(arguments))

TARGET = {  # five pairs of opposites
    "rise_fall_rise": (sweep, 0, 1, 0, 1),
    "fall_rise_fall": (sweep, 1, 0, 1, 0),
    "up_up_down": (calls, 1, 1, -1),
    "down_down_up": (calls, -1, -1, 1),
    "plucks_low_high_middle": (strings, 0, 2, 1),
    "plucks_high_low_middle": (strings, 2, 0, 1),
    "tone_noise_tone": (tone_and_noise, "tone", "noise", "tone"),
    "noise_tone_noise": (tone_and_noise, "noise", "tone", "noise"),
    "eoe": (vowel, "e", "o", "e"),
    "oeo": (vowel, "o", "e", "o"),
}

CLASSES = SOURCE | TARGET


def sound(name: str, rng: np.random.Generator) -> np.ndarray:
    """One sound of the class `name`, up to a second long: (samples,)."""
    family, *arguments = CLASSES[name]
    return family(rng, *arguments)


def render(name: str, index: int, seed: int = 0) -> np.ndarray:
    """Clip `index` of class `name`: (16000,) float32 in [-1, 1], always the same up to rounding.

    The sound begins within the first eighth of the second. It is -3 to 15 dB above a noise of
    random colour. The peak of both together is 1 to 20 dB below full scale.
    """
    rng = np.random.default_rng([seed, zlib.crc32(name.encode()), index])
    wave = sound(name, rng)
    clip = np.zeros(SAMPLES, np.float32)
    start = rng.integers(min(SAMPLES - len(wave), LATEST) + 1)
    clip[start : start + len(wave)] = wave
    slope = rng.random()  # from white noise (0) to pink noise, whose power falls as 1 / Hz (1)
    white = rng.standard_normal(SAMPLES, np.float32)
    noise = colour(white, lambda hz: np.maximum(hz, 20) ** (-slope / 2))
    signal_to_noise = 10 ** (rng.uniform(-3, 15) / 20)
    clip = clip / clip.std() + noise / noise.std() / signal_to_noise
    return (clip / abs(clip).max() * 10 ** (rng.uniform(-20, -1) / 20)).astype(np.float32)
