/* The functions of Native.java. */
#include <jni.h>
#include <stdint.h>

#include "model.h"

static void fail(JNIEnv *env, const char *message) {
  (*env)->ThrowNew(env, (*env)->FindClass(env, "java/lang/IllegalStateException"), message);
}

/* Whether all went well; if not, an exception is pending. */
static int ok(JNIEnv *env, int code) {
  if (code != QC_OK) fail(env, qc_error(code));
  return code == QC_OK;
}

static qc_instance *instance_of(jlong handle) { return (qc_instance *)(intptr_t)handle; }

JNIEXPORT jlong JNICALL Java_qc_model_Native_open(JNIEnv *env, jclass self, jstring file) {
  (void)self;
  qc_model *model = NULL;
  const char *path = (*env)->GetStringUTFChars(env, file, NULL);
  if (!path) return 0;
  ok(env, qc_open(path, &model));
  (*env)->ReleaseStringUTFChars(env, file, path);
  return (jlong)(intptr_t)model;
}

JNIEXPORT void JNICALL Java_qc_model_Native_close(JNIEnv *env, jclass self, jlong model) {
  (void)env, (void)self;
  qc_close((qc_model *)(intptr_t)model);
}

JNIEXPORT jlong JNICALL Java_qc_model_Native_create(JNIEnv *env, jclass self, jlong model, jint threads) {
  (void)self;
  qc_instance *instance = NULL;
  qc_options options = {0};
  options.threads = threads;
  ok(env, qc_create((const qc_model *)(intptr_t)model, NULL, &options, &instance));
  return (jlong)(intptr_t)instance;
}

JNIEXPORT void JNICALL Java_qc_model_Native_destroy(JNIEnv *env, jclass self, jlong instance) {
  (void)env, (void)self;
  qc_destroy(instance_of(instance));
}

/* Addresses of direct buffers; null where there is none. */
static int addresses(JNIEnv *env, jobjectArray buffers, int count, void **found) {
  if ((*env)->GetArrayLength(env, buffers) != count) {
    fail(env, "expected one buffer per port, or null");
    return 0;
  }
  for (int i = 0; i < count; i++) {
    jobject buffer = (*env)->GetObjectArrayElement(env, buffers, i);
    found[i] = buffer ? (*env)->GetDirectBufferAddress(env, buffer) : NULL;
    if (buffer && !found[i]) {
      fail(env, "expected direct buffers");
      return 0;
    }
    (*env)->DeleteLocalRef(env, buffer);
  }
  return 1;
}

JNIEXPORT void JNICALL Java_qc_model_Native_run(JNIEnv *env, jclass self, jlong instance, jlongArray dims,
                                                jobjectArray inputs, jobjectArray outputs) {
  (void)self;
  int64_t sizes[QC_DIMENSIONS > 0 ? QC_DIMENSIONS : 1];
  void *in[@@input_count@@], *out[@@output_count@@];
  if ((*env)->GetArrayLength(env, dims) != QC_DIMENSIONS) {
    fail(env, "expected the size of every dimension");
    return;
  }
  (*env)->GetLongArrayRegion(env, dims, 0, QC_DIMENSIONS, (jlong *)sizes);
  if (!addresses(env, inputs, @@input_count@@, in) || !addresses(env, outputs, @@output_count@@, out)) return;
  ok(env, qc_run(instance_of(instance), sizes, (const void *const *)in, out));
}
@@jni_generate@@
