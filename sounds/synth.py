"""Sounds made here, so that everything can be tried without downloading anything.

Each kind of sound is a short recipe: sweeps, vowels, bells, plucked strings, clicks, noises,
engines, and events that follow each other. SOURCE has 68 of them. The training of the small
backbone in `weights/` began with these. TARGET has ten of other kinds. It is the task that
`python train.py` adapts that backbone to.

TARGET is five pairs of opposites: where one rises the other falls. An average over time hardly
tells three of the pairs apart. It tells `eoe` from `oeo`, because each has more of another vowel,
and often a tone around a noise from a noise around a tone.

    wave = render("bell", index=0)  # (16000,) float32: one second at 16 kHz

A sound follows from its class, its index and a seed alone. Pitch, tempo, timbre, onset, level and
the noise behind it are drawn anew for each index.
"""

import zlib
from collections.abc import Callable

import numpy as np

from sounds.audio import RATE

SAMPLES = RATE  # of a clip: one second
LATEST = RATE // 8  # sample at which a sound begins, at the latest

# -------------------------------------------------------------------- blocks: arrays in, arrays out


def glide(seconds: float, *points: float) -> np.ndarray:
    """A curve through `points` at equal distances in time.

    It is straight on a logarithmic scale, as the ear hears pitch.
    """
    n = int(seconds * RATE)
    return np.exp(np.interp(np.linspace(0, 1, n), np.linspace(0, 1, len(points)), np.log(points)))


def tone(hz: np.ndarray, harmonics) -> np.ndarray:
    """A tone whose pitch follows the curve `hz`; harmonics[k] is the level of the (k + 1)-th."""
    cycles = (np.cumsum(hz / RATE) % 1).astype(np.float32)
    # A harmonic above half the sampling rate would be aliased.
    audible = [
        (k, level) for k, level in enumerate(harmonics, 1) if level and k * hz.max() < RATE / 2
    ]
    return sum(
        np.float32(level) * np.sin(np.float32(2 * np.pi * k) * cycles) for k, level in audible
    )


def buzz(hz: np.ndarray) -> np.ndarray:
    """A sawtooth: all harmonics, what vocal folds and cylinders give."""
    return (2 * (np.cumsum(hz / RATE) % 1) - 1).astype(np.float32)


def colour(sound: np.ndarray, gain: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """A filter: every frequency of the sound times gain(Hz)."""
    hz = np.fft.rfftfreq(SAMPLES, 1 / RATE)  # of one second, because other lengths may be slow
    filtered = np.fft.irfft(np.fft.rfft(sound, SAMPLES) * gain(hz), SAMPLES)
    return filtered[: len(sound)].astype(np.float32)


def hiss(rng, seconds: float, low: float, high: float) -> np.ndarray:
    """Noise between two frequencies in Hz, with soft edges."""
    return colour(
        rng.standard_normal(int(seconds * RATE), np.float32),
        lambda hz: 1 / (1 + (low / (hz + 1)) ** 8) / (1 + (hz / high) ** 8),
    )


def shaped(sound: np.ndarray, attack: float = 0.01, release: float = 0.03) -> np.ndarray:
    """The sound with a linear fade at both ends, in seconds: no clicks where none are meant."""
    n = len(sound)
    ramp = np.minimum(
        np.arange(n) / (attack * RATE + 1), np.arange(n, 0, -1) / (release * RATE + 1)
    )
    return sound * np.minimum(ramp, 1).astype(np.float32)


def dying(seconds: float, half_life: float) -> np.ndarray:
    """An envelope that halves every `half_life` seconds."""
    return np.exp2(-np.arange(int(seconds * RATE), dtype=np.float32) / (half_life * RATE))


def at(events: list[tuple[float, np.ndarray]]) -> np.ndarray:
    """Sounds added up at their times, (seconds, sound); what reaches beyond one second is lost."""
    clip = np.zeros(SAMPLES, np.float32)
    for seconds, sound in events:
        start = int(seconds * RATE)
        sound = sound[: max(0, SAMPLES - start)]
        clip[start : start + len(sound)] += sound
    return clip


def row(*sounds: np.ndarray, gap: float = 0.0) -> np.ndarray:
    """Sounds one after another, `gap` seconds of silence between them."""
    silence = np.zeros(int(gap * RATE), np.float32)
    return np.concatenate([piece for sound in sounds for piece in (sound, silence)])


# --------------------------------------------------- families: a random generator in, one sound out


def voice(rng) -> np.ndarray:
    """A random timbre: one to six harmonics."""
    numbers = np.arange(1, rng.integers(2, 8))
    return np.where(numbers == 1, 1, rng.uniform(0.2, 1, len(numbers)) / np.sqrt(numbers))


def pitch(rng, low: float, high: float) -> float:
    """A frequency in Hz, uniform on a logarithmic scale."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def sweep(rng, *octaves: float) -> np.ndarray:
    """One tone that glides through these heights, in units of a random interval."""
    size = rng.uniform(0.5, 1.6)
    base = pitch(rng, 250, 900)
    hz = glide(rng.uniform(0.5, 1), *(base * 2 ** (size * octave) for octave in octaves))
    return shaped(tone(hz, voice(rng)))


def chirps(rng, *octaves: float) -> np.ndarray:
    """The same short sweep again and again, 4 to 9 times a second."""
    rate = rng.uniform(4, 9)
    base = pitch(rng, 500, 1500)
    size = rng.uniform(0.5, 1.2)
    timbre = voice(rng)
    length = rng.uniform(0.4, 0.9) / rate
    hz = glide(length, *(base * 2 ** (size * octave) for octave in octaves))
    one = shaped(tone(hz, timbre), 0.005, 0.01)
    return at([(i / rate, one) for i in range(int(rate))])


def calls(rng, *steps: int) -> np.ndarray:
    """Short sweeps up (1) or down (-1), three to four of them a second."""
    rate = rng.uniform(3, 4)
    base = pitch(rng, 500, 1500)
    size = rng.uniform(0.5, 1.2)
    timbre = voice(rng)
    length = rng.uniform(0.5, 0.9) / rate
    up = glide(length, base, base * 2**size)
    return at(
        [(i / rate, shaped(tone(up[::step], timbre), 0.005, 0.01)) for i, step in enumerate(steps)]
    )


def steady(rng, harmonics) -> np.ndarray:
    return shaped(tone(glide(rng.uniform(0.4, 1), pitch(rng, 200, 1200)), harmonics))


def chord(rng, *ratios: float) -> np.ndarray:
    seconds = rng.uniform(0.5, 1)
    base = pitch(rng, 200, 600)
    timbre = voice(rng)
    return shaped(sum(tone(glide(seconds, base * ratio), timbre) for ratio in ratios))


def wobble(
    rng, rate: tuple[float, float], pitch_depth: float = 0.0, level_depth: float = 0.0
) -> np.ndarray:
    """Vibrato (pitch, in octaves) or tremolo (level, 0 to 1) at a rate in Hz."""
    speed = 2 * np.pi * rng.uniform(*rate)
    n = int(rng.uniform(0.7, 1) * RATE)
    phase = speed * np.arange(n) / RATE + rng.uniform(0, 6)
    wave = tone(pitch(rng, 300, 1200) * 2 ** (pitch_depth * np.sin(phase)), voice(rng))
    return shaped(wave * (1 - level_depth * (0.5 + 0.5 * np.sin(phase))))


def alternate(rng, rate: tuple[float, float], octaves: tuple[float, float]) -> np.ndarray:
    """Two pitches in turn, without a glide between them."""
    n = int(rng.uniform(0.75, 1) * RATE)
    second = (np.arange(n) / RATE * rng.uniform(*rate) + rng.uniform(0, 2)) % 2 > 1
    return shaped(tone(pitch(rng, 300, 1000) * 2 ** (rng.uniform(*octaves) * second), voice(rng)))


FORMANTS = {  # Hz; Peterson and Barney, "Control methods used in a study of the vowels", 1952, men
    "i": (270, 2290, 3010),
    "e": (530, 1840, 2480),
    "a": (730, 1090, 2440),
    "o": (570, 840, 2410),
    "u": (300, 870, 2240),
    "er": (490, 1350, 1690),
}


def vowel(rng, *names: str) -> np.ndarray:
    """A buzz through the resonances of the vocal tract; several vowels glide one into the next."""
    seconds = rng.uniform(0.4, 0.95)
    size = rng.uniform(0.9, 1.2)
    base = pitch(rng, 90, 260)
    folds = buzz(glide(seconds, *base * rng.uniform(0.85, 1.15, 3)))

    def tract(name):  # three resonances, each 180 Hz wide
        centres = [size * formant for formant in FORMANTS[name]]
        return lambda hz: sum(
            level / (1 + ((hz - centre) / 90) ** 2)
            for level, centre in zip((1, 0.6, 0.3), centres, strict=True)
        )

    spoken = [colour(folds, tract(name)) for name in names]
    # Which vowel is spoken when. 1.5 is halfway from the second to the third.
    position = np.interp(np.linspace(0, 1, len(folds)), [0.2, 0.8], [0, len(names) - 1])
    weights = [np.clip(1 - abs(position - i), 0, 1).astype(np.float32) for i in range(len(names))]
    speech = sum(weight * sound for weight, sound in zip(weights, spoken, strict=True))
    return shaped(speech, 0.03, 0.05)


def strike(rng, low: float, high: float, ratios, half_life: tuple[float, float]) -> np.ndarray:
    """Something hit: partials at `ratios` of a pitch. The upper ones die faster."""
    base = pitch(rng, low, high)
    life = rng.uniform(*half_life)
    seconds = rng.uniform(0.5, 0.95)
    ratios = np.asarray(ratios) * rng.uniform(0.98, 1.02, len(ratios))
    partials = (
        rng.uniform(0.3, 1) * tone(glide(seconds, base * r), [1]) * dying(seconds, life / r**0.7)
        for r in ratios
    )
    return shaped(sum(partials), 0.002, 0.05)


def string(hz: float, seconds: float, half_life: float) -> np.ndarray:
    """A plucked string: seven harmonics. The n-th is n times as weak, and dies n times as fast."""
    t = np.arange(int(seconds * RATE)) / RATE
    # The n-th power of the first harmonic is the n-th harmonic.
    first = np.exp2(-t / half_life) * np.exp(2j * np.pi * hz * t)
    return shaped(np.polyval([*(1 / n for n in range(7, 0, -1)), 0], first).imag, 0.002, 0.02)


def strings(rng, *octaves: float) -> np.ndarray:
    """Strings plucked one after another at these heights, in units of a random interval."""
    base = pitch(rng, 150, 450)
    size = rng.uniform(0.3, 0.6)
    step = rng.uniform(0.13, 0.2)
    length = 0.9 - step * (len(octaves) - 1)
    life = rng.uniform(0.04, 0.15)
    heights = [base * 2 ** (size * octave) for octave in octaves]
    return at([(i * step, string(hz, length, life)) for i, hz in enumerate(heights)])


def click(rng) -> np.ndarray:
    """A few milliseconds of a resonance."""
    return tone(glide(0.012, pitch(rng, 800, 4000)), [1]) * dying(0.012, rng.uniform(0.001, 0.003))


def clicks(rng, *rates: float) -> np.ndarray:
    """Clicks whose number per second follows `rates`, each times a random tempo."""
    rate = glide(1, *(rate * rng.uniform(0.8, 1.25) for rate in rates))
    density = np.cumsum(rate / RATE) + rng.uniform(0, 1)
    starts = np.flatnonzero(np.diff(density.astype(int))) / RATE
    one = click(rng)
    return at([(start, one) for start in starts])


def gallop(rng, rhythm: tuple[float, ...], tempo: tuple[float, float]) -> np.ndarray:
    """Clicks in a rhythm: their times as parts of a bar, and the bars in a second."""
    bars = rng.uniform(*tempo)
    one = click(rng)
    start = rng.uniform(0, 0.2)
    return at(
        [(start + (bar + part) / bars, one) for bar in range(int(bars) + 1) for part in rhythm]
    )


def scatter(rng, density: tuple[float, float]) -> np.ndarray:
    """Clicks at random times, with sounds and levels of their own. Many of them are rain."""
    count = rng.poisson(rng.uniform(*density))
    kinds = [click(rng) for _ in range(8)]
    times = rng.uniform(0, 0.98, max(count, 3))
    return at([(t, rng.lognormal(0, 0.8) * kinds[rng.integers(8)]) for t in times])


def drips(rng) -> np.ndarray:
    """Drops into water: short blips of rising pitch."""
    events = []
    for start in np.arange(rng.uniform(0, 0.2), 0.95, rng.uniform(0.15, 0.3)):
        hz = pitch(rng, 500, 1200)
        length = rng.uniform(0.03, 0.06)
        blip = tone(glide(length, hz, 2 * hz), [1]) * dying(length, 0.02)
        events.append((start, shaped(blip, 0.002)))
    return at(events)


def band(rng, low: float, high: float) -> np.ndarray:
    shift = rng.uniform(0.8, 1.25)
    return shaped(hiss(rng, rng.uniform(0.4, 1), low * shift, high * shift))


def moving_band(rng, start: float, end: float) -> np.ndarray:
    """Noise whose band moves from one frequency to another: three bands, faded into each other."""
    seconds = rng.uniform(0.5, 1)
    shift = rng.uniform(0.8, 1.25)
    centres = shift * np.geomspace(start, end, 3)
    bands = [hiss(rng, seconds, centre / 1.4, centre * 1.4) for centre in centres]
    position = np.linspace(0, 2, len(bands[0]), dtype=np.float32)
    return shaped(sum(np.clip(1 - abs(position - i), 0, 1) * band for i, band in enumerate(bands)))


def pulsing_noise(rng, rate: tuple[float, float]) -> np.ndarray:
    seconds = rng.uniform(0.7, 1)
    centre = pitch(rng, 600, 4000)
    noise = hiss(rng, seconds, centre / 2, centre * 2)
    phase = 2 * np.pi * rng.uniform(*rate) * np.arange(len(noise)) / RATE
    return shaped(noise * (0.5 + 0.5 * np.sin(phase)) ** 2)


def swelling_noise(rng, start: float, end: float) -> np.ndarray:
    """Noise that grows louder or softer, from the level `start` to the level `end`."""
    seconds = rng.uniform(0.6, 1)
    centre = pitch(rng, 600, 4000)
    noise = hiss(rng, seconds, centre / 2, centre * 2)
    return shaped(noise * glide(seconds, start, end))


def engine(rng, *speeds: float) -> np.ndarray:
    """Combustion at 25 to 60 Hz times `speeds`, through an exhaust, with noise in its rhythm."""
    seconds = rng.uniform(0.7, 1)
    base = pitch(rng, 25, 60)
    exhaust = pitch(rng, 150, 500)
    strokes = buzz(glide(seconds, *(base * speed for speed in speeds)))
    noise = rng.standard_normal(len(strokes), np.float32) * np.clip(strokes, 0, 1) ** 3
    sound = colour(strokes + 0.7 * noise, lambda hz: 1 / (1 + ((hz - exhaust) / exhaust) ** 2))
    return shaped(sound, 0.05, 0.05)


def insect(
    rng, carrier: tuple[float, float], pulse: tuple[float, float], song: tuple[float, float]
) -> np.ndarray:
    """A tone in pulses, and the pulses in phrases. Crickets are high and fast, frogs low and slow.

    The ranges are of the pitch and of the two rates, in Hz.
    """
    t = np.arange(int(rng.uniform(0.8, 1) * RATE)) / RATE
    wave = tone(np.full(len(t), pitch(rng, *carrier)), [1, 0.3])
    fast = 0.5 - 0.5 * np.cos(2 * np.pi * rng.uniform(*pulse) * t)
    return wave * fast * ((t * rng.uniform(*song) + rng.uniform(0, 1)) % 1 < 0.6)


def beep(hz: float, seconds: float, timbre) -> np.ndarray:
    return shaped(tone(glide(seconds, hz), timbre), 0.01, 0.02)


def beeps(rng, *lengths: int) -> np.ndarray:
    """One pitch in a rhythm, short (1) and long (3), as in Morse code."""
    unit = rng.uniform(0.06, 0.085)
    hz = pitch(rng, 300, 1500)
    timbre = voice(rng)
    return row(*(beep(hz, unit * length, timbre) for length in lengths), gap=unit)


def notes(rng, *steps: int) -> np.ndarray:
    """Notes of one length at these heights, in units of an interval of 3 to 8 semitones."""
    length = rng.uniform(0.14, 0.25)
    base = pitch(rng, 300, 700)
    size = rng.uniform(3, 8) / 12
    timbre = voice(rng)
    sounds = [beep(base * 2 ** (size * step), length, timbre) for step in steps]
    return row(*sounds, gap=rng.uniform(0, 0.05))


def tone_and_noise(rng, *kinds: str) -> np.ndarray:
    """A tone (t), a noise (n) or a click (c), in the given order."""
    length = rng.uniform(0.12, 0.22)
    hz = pitch(rng, 300, 1500)
    timbre = voice(rng)
    centre = pitch(rng, 800, 4000)
    make = {
        "t": lambda: beep(hz, length, timbre),
        "n": lambda: 2 * shaped(hiss(rng, length, centre / 1.5, centre * 1.5)),
        "c": lambda: row(1.5 * click(rng), gap=length / 2),
    }
    gap = rng.uniform(0.02, 0.08)
    return row(*[make[kind]() for kind in kinds], gap=gap)


def hisses(rng, *steps: int) -> np.ndarray:
    """Bursts of noise, dark (0) and bright (1). The bands are 1.5 to 2.5 octaves apart."""
    length = rng.uniform(0.22, 0.28)
    dark = pitch(rng, 400, 1000)
    apart = rng.uniform(1.5, 2.5)
    centres = [dark * 2 ** (apart * step) for step in steps]
    gap = rng.uniform(0.02, 0.06)
    bursts = [shaped(hiss(rng, length, centre / 1.3, centre * 1.3)) for centre in centres]
    return row(*bursts, gap=gap)


# -------------------------------------------------------------------------------------- the classes

# The name of a sound, its family, and the arguments of the family after the random generator.
SOURCE = {
    # Pitch that moves
    "rise": (sweep, 0, 1),
    "fall": (sweep, 1, 0),
    "hill": (sweep, 0, 1, 0),
    "valley": (sweep, 1, 0, 1),
    "late_jump": (sweep, 0, 0, 0, 1),
    "early_drop": (sweep, 1, 0, 0, 0),
    "chirps_up": (chirps, 0, 1),
    "chirps_down": (chirps, 1, 0),
    "slow_vibrato": (wobble, (3, 5), 0.15),
    "fast_vibrato": (wobble, (9, 14), 0.15),
    "slow_tremolo": (wobble, (3, 5), 0, 0.9),
    "fast_tremolo": (wobble, (10, 16), 0, 0.9),
    "two_tone_siren": (alternate, (2.5, 4), (0.3, 0.6)),
    "wailing_siren": (wobble, (1, 1.8), 0.5),
    # Tones that stay
    "whistle": (steady, [1]),
    "organ": (steady, [1, 0.7, 0.5, 0.4, 0.3, 0.25, 0.2, 0.15]),
    "clarinet": (steady, [1, 0, 0.6, 0, 0.4, 0, 0.3, 0, 0.2]),
    "fifth": (chord, 1, 1.5),
    "minor_second": (chord, 1, 1.06),
    "triad": (chord, 1, 1.26, 1.5),
    # Voices
    "vowel_i": (vowel, "i"),
    "vowel_a": (vowel, "a"),
    "vowel_u": (vowel, "u"),
    "vowel_er": (vowel, "er"),
    "ai": (vowel, "a", "i"),
    "ia": (vowel, "i", "a"),
    "iu": (vowel, "i", "u"),
    "ui": (vowel, "u", "i"),
    # Things hit and plucked
    "bell": (strike, 400, 1000, (1, 2, 2.4, 3, 4.5, 5.3), (0.12, 0.3)),
    "gong": (strike, 90, 200, (1, 1.6, 2.3, 3.1, 4.3, 5.9), (0.15, 0.4)),
    "wood_block": (strike, 500, 1300, (1, 2.6), (0.01, 0.03)),
    "pluck": (strings, 0),
    "plucks_up": (strings, 0, 1, 2),
    "plucks_down": (strings, 2, 1, 0),
    # Clicks
    "slow_clicks": (clicks, 6),
    "fast_clicks": (clicks, 20),
    "clicks_faster": (clicks, 5, 25),
    "clicks_slower": (clicks, 25, 5),
    "gallop": (gallop, (0, 0.25), (3, 5)),
    "crackle": (scatter, (8, 25)),
    "rain": (scatter, (120, 250)),
    "drips": (drips,),
    # Noises and machines
    "low_noise": (band, 150, 500),
    "high_noise": (band, 3000, 6000),
    "noise_up": (moving_band, 500, 4000),
    "noise_down": (moving_band, 4000, 500),
    "noise_pulses": (pulsing_noise, (4, 7)),
    "noise_grows": (swelling_noise, 0.05, 1),
    "noise_fades": (swelling_noise, 1, 0.05),
    "engine_runs": (engine, 1),
    "engine_starts": (engine, 0.7, 2.5),
    "engine_stops": (engine, 2.5, 0.7),
    "cricket": (insect, (3000, 5500), (25, 45), (3, 5)),
    "frog": (insect, (400, 900), (18, 28), (1.5, 3)),
    # One thing after another
    "cuckoo": (notes, 1, 0),
    "doorbell": (notes, 0, 1),
    "yodel": (notes, 0, 1, 0),
    "dip": (notes, 1, 0, 1),
    "arpeggio_up": (notes, 0, 1, 2),
    "arpeggio_down": (notes, 2, 1, 0),
    "dark_bright": (hisses, 0, 1),
    "bright_dark": (hisses, 1, 0),
    "tone_noise": (tone_and_noise, "t", "n"),
    "noise_tone": (tone_and_noise, "n", "t"),
    "click_tone": (tone_and_noise, "c", "t"),
    "tone_click": (tone_and_noise, "t", "c"),
    "dash_dot_dot": (beeps, 3, 1, 1),
    "dot_dot_dash": (beeps, 1, 1, 3),
}
TARGET = {  # five pairs: what one does, the other does the other way round
    "rise_fall_rise": (sweep, 0, 1, 0, 1),
    "fall_rise_fall": (sweep, 1, 0, 1, 0),
    "up_up_down": (calls, 1, 1, -1),
    "down_down_up": (calls, -1, -1, 1),
    "plucks_low_high_middle": (strings, 0, 2, 1),
    "plucks_high_low_middle": (strings, 2, 0, 1),
    "tone_noise_tone": (tone_and_noise, "t", "n", "t"),
    "noise_tone_noise": (tone_and_noise, "n", "t", "n"),
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
    wave = sound(name, rng)[:SAMPLES]
    clip = np.zeros(SAMPLES, np.float32)
    start = rng.integers(min(SAMPLES - len(wave), LATEST) + 1)
    clip[start : start + len(wave)] = wave
    # 0 is white noise, and 1 is pink noise, whose power falls with the frequency.
    slope = rng.uniform(0, 1)
    white = rng.standard_normal(SAMPLES, np.float32)
    noise = colour(white, lambda hz: np.maximum(hz, 20) ** (-slope / 2))
    signal_to_noise = 10 ** (rng.uniform(-3, 15) / 20)
    clip = clip / clip.std() + noise / noise.std() / signal_to_noise
    return (clip / abs(clip).max() * 10 ** (rng.uniform(-20, -1) / 20)).astype(np.float32)
