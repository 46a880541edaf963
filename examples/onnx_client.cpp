// Detect with an exported ONNX file of upright boxes, by ONNX Runtime's C API and the standard library alone.
//
//     g++ -std=c++17 -O2 onnx_client.cpp -I ONNXRUNTIME/include -L ONNXRUNTIME/lib -lonnxruntime -o onnx_client
//     onnx_client MODEL.onnx IMAGE.ppm [SCORE_THRESHOLD]
//
// PPM (P6, 8 bits) is what `convert image.jpg image.ppm` and `ffmpeg -i image.jpg image.ppm` write. A line a detection:
// label, score, x1, y1, x2, y2 in pixels of the image.

#include <onnxruntime_c_api.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <stdexcept>
#include <string>
#include <vector>

static const OrtApi* ort = OrtGetApiBase()->GetApi(ORT_API_VERSION);

static void check(OrtStatus* status) {
    if (status == nullptr) return;
    const std::string message = ort->GetErrorMessage(status);
    ort->ReleaseStatus(status);
    throw std::runtime_error(message);
}

struct Image {
    int width, height;
    std::vector<uint8_t> rgb;  // [height, width, 3]
};

static Image read_ppm(const char* path) {
    std::ifstream file(path, std::ios::binary);
    std::string magic;
    Image image{0, 0, {}};
    int greatest = 0;
    file >> magic >> image.width >> image.height >> greatest;
    file.get();
    if (!file || magic != "P6" || greatest != 255 || image.width < 1 || image.height < 1)
        throw std::runtime_error(std::string(path) + " is no PPM of 8 bits (P6)");
    image.rgb.resize(size_t(3) * image.width * image.height);
    if (!file.read(reinterpret_cast<char*>(image.rgb.data()), image.rgb.size()))
        throw std::runtime_error(std::string(path) + " is cut off");
    return image;
}

// Network input [1, 3, size, size]: resized (bilinear, pixel centres) to w x h, padded on the right and at the bottom.
static std::vector<float> letterbox(const Image& image, int size, int w, int h) {
    const float mean[3] = {103.53f, 116.28f, 123.675f}, deviation[3] = {57.375f, 57.12f, 58.395f};  // BGR
    const size_t plane = size_t(size) * size;
    std::vector<float> blob(3 * plane);
    for (int c = 0; c < 3; ++c)
        std::fill_n(blob.begin() + c * plane, plane, (114 - mean[c]) / deviation[c]);
    for (int y = 0; y < h; ++y) {
        const float fy = std::clamp((y + 0.5f) * image.height / h - 0.5f, 0.0f, image.height - 1.0f);
        const int y0 = int(fy), y1 = std::min(y0 + 1, image.height - 1);
        for (int x = 0; x < w; ++x) {
            const float fx = std::clamp((x + 0.5f) * image.width / w - 0.5f, 0.0f, image.width - 1.0f);
            const int x0 = int(fx), x1 = std::min(x0 + 1, image.width - 1);
            for (int c = 0; c < 3; ++c) {
                const auto at = [&](int row, int column) {
                    return float(image.rgb[(size_t(row) * image.width + column) * 3 + 2 - c]);  // RGB to BGR
                };
                const float top = at(y0, x0) + (fx - x0) * (at(y0, x1) - at(y0, x0));
                const float bottom = at(y1, x0) + (fx - x0) * (at(y1, x1) - at(y1, x0));
                const float grey = float(int(top + (fy - y0) * (bottom - top) + 0.5f));
                blob[c * plane + size_t(y) * size + x] = (grey - mean[c]) / deviation[c];
            }
        }
    }
    return blob;
}

static void detect(const char* model, const char* path, float threshold) {
    const Image image = read_ppm(path);
    OrtEnv* env;
    OrtSessionOptions* options;
    OrtSession* session;
    check(ort->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "client", &env));
    check(ort->CreateSessionOptions(&options));
    check(ort->CreateSession(env, model, options, &session));

    OrtAllocator* allocator;
    OrtModelMetadata* metadata;
    char* about = nullptr;  // JSON
    check(ort->GetAllocatorWithDefaultOptions(&allocator));
    check(ort->SessionGetModelMetadata(session, &metadata));
    check(ort->ModelMetadataLookupCustomMetadataMap(metadata, allocator, "rtmdet_fast", &about));
    const std::string json = about ? about : "", key = "\"image_size\": ";
    if (json.find(key) == std::string::npos) throw std::runtime_error(std::string(model) + " tells no image_size");
    const int size = std::atoi(json.c_str() + json.find(key) + key.size());

    const double ratio = double(size) / std::max(image.width, image.height);
    const int w = std::max(int(image.width * ratio + 0.5), 1), h = std::max(int(image.height * ratio + 0.5), 1);
    std::vector<float> blob = letterbox(image, size, w, h);

    const std::array<int64_t, 4> shape = {1, 3, size, size};
    OrtMemoryInfo* memory;
    OrtValue* input;
    check(ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
    check(ort->CreateTensorWithDataAsOrtValue(memory, blob.data(), blob.size() * sizeof(float), shape.data(),
                                              shape.size(), ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &input));
    const char* inputs[] = {"input"};
    const char* outputs[] = {"dets", "labels"};
    OrtValue* found[2] = {nullptr, nullptr};
    check(ort->Run(session, nullptr, inputs, &input, 1, outputs, 2, found));

    OrtTensorTypeAndShapeInfo* info;
    std::array<int64_t, 3> sizes;  // 1, detections, 5
    float* dets;
    int64_t* labels;
    check(ort->GetTensorTypeAndShape(found[0], &info));
    check(ort->GetDimensions(info, sizes.data(), sizes.size()));
    check(ort->GetTensorMutableData(found[0], reinterpret_cast<void**>(&dets)));
    check(ort->GetTensorMutableData(found[1], reinterpret_cast<void**>(&labels)));
    if (sizes[2] != 5) throw std::runtime_error(std::string(model) + " is of rotated boxes");
    const float x_scale = float(w) / image.width, y_scale = float(h) / image.height;
    for (const float* box = dets; box < dets + 5 * sizes[1]; box += 5) {
        const int64_t label = labels[(box - dets) / 5];
        if (label < 0 || !(box[4] > threshold)) continue;
        std::printf("%d %.6f %.4f %.4f %.4f %.4f\n", int(label), box[4], box[0] / x_scale, box[1] / y_scale,
                    box[2] / x_scale, box[3] / y_scale);
    }
    ort->ReleaseTensorTypeAndShapeInfo(info);
    for (OrtValue* value : {input, found[0], found[1]}) ort->ReleaseValue(value);
    ort->ReleaseMemoryInfo(memory);
    check(ort->AllocatorFree(allocator, about));
    ort->ReleaseModelMetadata(metadata);
    ort->ReleaseSession(session);
    ort->ReleaseSessionOptions(options);
    ort->ReleaseEnv(env);
}

int main(int argc, char** argv) {
    if (argc < 3) {
        std::fprintf(stderr, "onnx_client MODEL.onnx IMAGE.ppm [SCORE_THRESHOLD]\n");
        return 2;
    }
    try {
        detect(argv[1], argv[2], argc > 3 ? float(std::atof(argv[3])) : 0.3f);
    } catch (const std::exception& error) {
        std::fprintf(stderr, "error: %s\n", error.what());
        return 2;
    }
    return 0;
}
