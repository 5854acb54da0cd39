"""The texts of the kits for Android."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path

from qc.backends.kits.c_language import generates
from qc.backends.kits.facts import Facts
from qc.backends.kits.fixed import FixedFiles
from qc.backends.kits.interface import KOTLIN

__all__ = ["fixed_texts", "library_texts", "runtime_texts"]

_GENERATE = """
    /** The continuation of [tokens]; at temperature 0 each is the most probable one. */
    @JvmOverloads
    fun generateTokens(tokens: LongArray, maxTokens: Int = 64, temperature: Float = 0f, seed: Long = 0) = sequence {
        Native.reset(instance)
        val state = longArrayOf(seed)
        var fresh = tokens
        repeat(minOf(maxTokens, Interface.LIMIT - tokens.size)) {
            Native.feed(instance, fresh)
            val token = Native.sample(instance, temperature, state)
            if (token in Interface.STOP) return@sequence
            yield(token)
            fresh = longArrayOf(token)
        }
    }

    /** The continuation of a text, piece by piece. */
    @JvmOverloads
    fun generate(prompt: String, maxTokens: Int = 64, temperature: Float = 0f, seed: Long = 0): Sequence<String> {
        val tokenizer = text ?: throw ArtifactException("tokenizer.json", "the model was opened without a tokenizer")
        return tokenizer.stream(generateTokens(tokenizer.prompt(prompt), maxTokens, temperature, seed))
    }
"""

_JAVA = """
    public static native void reset(long instance);

    public static native void feed(long instance, long[] tokens);

    /** Draws the next token; at temperature 0 the most probable one. Advances seed[0]. */
    public static native long sample(long instance, float temperature, long[] seed);
"""

_JNI = """
JNIEXPORT void JNICALL Java_qc_model_Native_reset(JNIEnv *env, jclass self, jlong instance) {
  (void)self;
  ok(env, qc_reset(instance_of(instance)));
}

JNIEXPORT void JNICALL Java_qc_model_Native_feed(JNIEnv *env, jclass self, jlong instance, jlongArray tokens) {
  (void)self;
  const jsize count = (*env)->GetArrayLength(env, tokens);
  jlong *held = (*env)->GetLongArrayElements(env, tokens, NULL);
  if (!held) return;
  const int code = qc_feed(instance_of(instance), (const int64_t *)held, count);
  (*env)->ReleaseLongArrayElements(env, tokens, held, JNI_ABORT);
  ok(env, code);
}

JNIEXPORT jlong JNICALL Java_qc_model_Native_sample(JNIEnv *env, jclass self, jlong instance, jfloat temperature,
                                                    jlongArray seed) {
  (void)self;
  int64_t token = 0;
  jlong state = 0;
  qc_sampling sampling = {0};
  (*env)->GetLongArrayRegion(env, seed, 0, 1, &state);
  if ((*env)->ExceptionCheck(env)) return 0;
  sampling.temperature = temperature;
  sampling.seed = (uint64_t)state;
  if (!ok(env, qc_sample(instance_of(instance), &sampling, &token))) return 0;
  state = (jlong)sampling.seed;
  (*env)->SetLongArrayRegion(env, seed, 0, 1, &state);
  return token;
}
"""

_USES = {
    "generate": '    for (piece in model.generate("Once upon a time")) print(piece)',
    "embed": '    val vector = model.embed("a leaf")',
    "run": "    model.run(inputs)",
}

_LIBRARY_FILES = """| `Native.java`, `src/main/cpp` | the C library by JNI; the NDK builds it |
"""

_LIBRARY_NOTES = """
The library needs nothing at run time. It is compiled for arm64, so an emulator on x86 does not run it.
"""

_RUNTIME_NOTES = """
## A smaller runtime

`../required_operators.config` lists the operators of this model. With it, ONNX Runtime's own build script makes an AAR
that holds only these, and loads `model.ort`:

```sh
python tools/ci_build/github/android/build_aar_package.py --include_ops_by_config required_operators.config \\
  tools/ci_build/github/android/default_full_aar_build_settings.json
```

`report.html` says what NNAPI would take of the model; by default everything runs on the CPU's integer kernels.
"""


_NATIVE = """\
    defaultConfig { ndk { abiFilters += "arm64-v8a" } }
    externalNativeBuild { cmake { path = file("src/main/cpp/CMakeLists.txt") } }
"""

_DEPENDENCY = """\
    implementation("com.microsoft.onnxruntime:{}:{}.0") // or your {} build of it
"""

_STEPS = """| `Steps.kt` | feeds a text to the graphs, a part at a time |
"""

_UNITS = {
    "nnapi": ("onnxruntime-android", "addNnapi()"),
    "qnn": (
        "onnxruntime-android-qnn",
        'addQnn(mapOf("backend_path" to "libQnnHtp.so"))\naddConfigEntry("session.disable_cpu_ep_fallback", "1")',
    ),
}
"""The library with the accelerator, and how it is chosen."""

_FIXED_NOTES = """
`Steps.kt` opens the graphs with the accelerator that they are written for. To see them run without it, say in an
emulator, give `Model.open` other options: `OrtSession.SessionOptions()`.
"""

_WITH_QNN = "1.26"
"""The version of ONNX Runtime for an artifact whose manifest counts in those of the plugin for QNN."""


def runtime_texts(facts: Facts, directory: Path) -> Mapping[str, str]:
    """For an app with ONNX Runtime."""
    return KOTLIN.texts(facts) | {
        "kotlin_use": _USES[facts.task],
        "android_model": "model.ort",
        "gradle_native": "",
        "gradle_dependency": _DEPENDENCY.format("onnxruntime-android", facts.runtime[1], "reduced"),
        "android_files": _STEPS,
        "android_refuses": f"a runtime older than\n{facts.runtime[1]}, ",
        "android_notes": _RUNTIME_NOTES,
        "with_qnn": _WITH_QNN,
    }


def fixed_texts(facts: Facts, directory: Path) -> Mapping[str, str]:
    """For an app with ONNX Runtime in front of an accelerator."""
    files = FixedFiles.of(directory)
    library, provider = _UNITS[files.unit]
    version = _WITH_QNN if files.unit == "qnn" else facts.runtime[1]
    return runtime_texts(facts, directory) | {
        "graphs": KOTLIN.texts(facts, files.graphs)["graphs"],
        "kotlin_files": ", ".join(f'"{n}"' for n in files.names),
        "kotlin_provider": textwrap.indent(provider, " " * 12),
        "android_model": '", "'.join(files.names),
        "gradle_dependency": _DEPENDENCY.format(library, version, "own"),
        "android_refuses": f"a runtime older than\n{version}, ",
        "android_notes": _FIXED_NOTES,
    }


def library_texts(facts: Facts, directory: Path) -> Mapping[str, str]:
    """For an app with the C library."""
    text = generates(directory)
    level = json.loads((directory / "model.json").read_text("utf-8"))["march"]
    return KOTLIN.texts(facts) | {
        "kotlin_use": _USES["generate" if text else "run"],
        "kotlin_generate": _GENERATE if text else "",
        "java_generate": _JAVA if text else "",
        "jni_generate": _JNI if text else "",
        "input_count": str(len(facts.signature.inputs)),
        "output_count": str(len(facts.signature.outputs)),
        "march": f"-march={level}",
        "android_model": "model.weights",
        "gradle_native": _NATIVE,
        "gradle_dependency": "",
        "android_files": _LIBRARY_FILES,
        "android_refuses": "",
        "android_notes": _LIBRARY_NOTES,
        "with_qnn": _WITH_QNN,
    }
